//! Instructions that only change what the image says of itself. They add no node.

use forge_solver::graph::image::{Empty, Healthcheck};

use super::state::{Builder, Result};
use super::text;
use crate::diagnostic::{Diagnostic, Span};
use crate::duration;
use crate::instruction::{Code, CommandLine, Instruction, Kind, Pair, Word};

pub fn instruction(builder: &mut Builder<'_>, instruction: &Instruction) -> Result<()> {
    let code = &instruction.code;
    let history = match &instruction.kind {
        Kind::Env(pairs) => env(builder, code, pairs)?,
        Kind::Label(pairs) => label(builder, code, pairs)?,
        Kind::Cmd(line) => cmd(builder, instruction, line),
        Kind::Entrypoint(line) => entrypoint(builder, instruction, line),
        Kind::Shell(shell) => {
            builder.out.config.config.shell = Some(shell.clone());
            format!("SHELL {}", text::list(shell))
        }
        Kind::User(word) => {
            let user = builder.expand(code, word)?;
            builder.out.config.config.user.clone_from(&user);
            format!("USER {user}")
        }
        Kind::Expose(words) => expose(builder, code, words)?,
        Kind::Volume(words) => volume(builder, code, words)?,
        Kind::StopSignal(word) => stop_signal(builder, code, word)?,
        Kind::Healthcheck(check) => healthcheck(builder, check),
        Kind::Maintainer(name) => {
            builder.out.config.author = Some(name.clone());
            format!("MAINTAINER {name}")
        }
        // No line of history.
        Kind::Onbuild(onbuild) => {
            builder.out.config.config.on_build.push(onbuild.source.clone());
            return Ok(());
        }
        Kind::Arg(_) | Kind::Run(_) | Kind::Copy(_) | Kind::Workdir(_) => return Ok(()),
    };
    builder.note(code, history)
}

/// All values are expanded by what was set before the instruction.
fn pairs(builder: &mut Builder<'_>, code: &Code, pairs: &[Pair]) -> Result<Vec<(String, String)>> {
    let mut expanded = Vec::with_capacity(pairs.len());
    for pair in pairs {
        expanded.push((builder.expand(code, &pair.key)?, builder.expand(code, &pair.value)?));
    }
    Ok(expanded)
}

fn env(builder: &mut Builder<'_>, code: &Code, words: &[Pair]) -> Result<String> {
    let mut history = String::from("ENV");
    for (name, value) in pairs(builder, code, words)? {
        super::scope::set(&mut builder.out.scope, &name, &value);
        builder.out.config.config.set_env(&name, &value);
        history.push_str(&format!(" {name}={value}"));
    }
    Ok(history)
}

fn label(builder: &mut Builder<'_>, code: &Code, words: &[Pair]) -> Result<String> {
    let mut history = String::from("LABEL");
    for (name, value) in pairs(builder, code, words)? {
        history.push_str(&format!(" {name}={value}"));
        builder.out.config.config.labels.insert(name, value);
    }
    Ok(history)
}

/// A command line with its shell in front, if it is for one.
pub fn with_shell(builder: &Builder<'_>, command: &str) -> Vec<String> {
    let shell = builder.out.config.config.shell.clone().filter(|shell| !shell.is_empty());
    let mut args = shell.unwrap_or_else(|| vec!["/bin/sh".to_owned(), "-c".to_owned()]);
    args.push(command.to_owned());
    args
}

fn command(builder: &mut Builder<'_>, instruction: &Instruction, line: &CommandLine) -> Vec<String> {
    match line {
        CommandLine::Exec(args) => args.clone(),
        CommandLine::Shell(word) => {
            if builder.out.config.config.shell.as_ref().is_none_or(Vec::is_empty) {
                let keyword = &instruction.keyword;
                let message = format!(
                    "JSON arguments recommended for {} to prevent unintended behavior related to OS signals",
                    keyword.text
                );
                builder.lint("JSONArgsRecommended", &instruction.code, instruction.code.span, message);
            }
            with_shell(builder, &word.text)
        }
    }
}

fn cmd(builder: &mut Builder<'_>, instruction: &Instruction, line: &CommandLine) -> String {
    let args = command(builder, instruction, line);
    let history = format!("CMD {}", text::quoted_list(&args));
    builder.cmd_set = true;
    builder.out.config.config.cmd = Some(args).filter(|args| !args.is_empty());
    builder.out.config.config.args_escaped = Some(true);
    history
}

/// An entrypoint of its own makes an inherited CMD meaningless.
fn entrypoint(builder: &mut Builder<'_>, instruction: &Instruction, line: &CommandLine) -> String {
    let args = command(builder, instruction, line);
    let history = format!("ENTRYPOINT {}", text::quoted_list(&args));
    builder.out.config.config.entrypoint = Some(args).filter(|args| !args.is_empty());
    if !builder.cmd_set {
        builder.out.config.config.cmd = None;
    }
    history
}

fn volume(builder: &mut Builder<'_>, code: &Code, words: &[Word]) -> Result<String> {
    let mut volumes = Vec::new();
    for word in words {
        let volume = builder.expand(code, word)?;
        if volume.is_empty() {
            return Err(Diagnostic::error(word.span, "VOLUME specified can not be an empty string"));
        }
        volumes.push(volume);
    }
    builder.out.config.config.volumes.extend(volumes.iter().map(|volume| (volume.clone(), Empty {})));
    Ok(format!("VOLUME {}", text::list(&volumes)))
}

fn healthcheck(builder: &mut Builder<'_>, check: &crate::instruction::Healthcheck) -> String {
    builder.out.config.config.healthcheck = Some(Healthcheck {
        test: check.test.clone(),
        interval: check.interval,
        timeout: check.timeout,
        start_period: check.start_period,
        start_interval: check.start_interval,
        retries: check.retries,
        ..Healthcheck::default()
    });
    format!(
        "HEALTHCHECK {{Test:{} Interval:{} Timeout:{} StartPeriod:{} StartInterval:{} Retries:{}}}",
        text::list(&check.test),
        duration::format(check.interval),
        duration::format(check.timeout),
        duration::format(check.start_period),
        duration::format(check.start_interval),
        check.retries
    )
}

/// Linux: signal(7), without `SIG`.
const SIGNALS: [&str; 34] = [
    "ABRT", "ALRM", "BUS", "CHLD", "CLD", "CONT", "FPE", "HUP", "ILL", "INT", "IO", "IOT", "KILL", "PIPE", "POLL",
    "PROF", "PWR", "QUIT", "SEGV", "STKFLT", "STOP", "SYS", "TERM", "TRAP", "TSTP", "TTIN", "TTOU", "URG", "USR1",
    "USR2", "VTALRM", "WINCH", "XCPU", "XFSZ",
];

fn stop_signal(builder: &mut Builder<'_>, code: &Code, word: &Word) -> Result<String> {
    let signal = builder.expand(code, word)?;
    let upper = signal.to_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |text: &str, limit: u8| text.is_empty() || text.parse::<u8>().is_ok_and(|n| (1..=limit).contains(&n));
    let realtime = name
        .strip_prefix("RTMIN")
        .map(|rest| offset(rest.strip_prefix('+').unwrap_or(rest), 15))
        .or_else(|| name.strip_prefix("RTMAX").map(|rest| offset(rest.strip_prefix('-').unwrap_or(rest), 14)));
    let number = signal.parse::<i64>().is_ok_and(|number| number != 0);
    if !number && !SIGNALS.contains(&name) && realtime != Some(true) {
        let diagnostic = Diagnostic::error(word.span, format!("invalid signal: {signal}"));
        return Err(diagnostic.hint("name one as kill(1) does, such as SIGTERM or 15").suggest(name, SIGNALS));
    }
    builder.out.config.config.stop_signal = Some(signal.clone());
    Ok(format!("STOPSIGNAL {signal}"))
}

// EXPOSE

fn expose(builder: &mut Builder<'_>, code: &Code, words: &[Word]) -> Result<String> {
    let mut words: Vec<&Word> = words.iter().collect();
    words.sort_by(|a, b| a.text.cmp(&b.text));
    let mut ports = Vec::new();
    for word in words {
        let scope = builder.out.scope.as_slice();
        let expanded = builder
            .expander()
            .expand(&word.text, scope)
            .map_err(|error| Diagnostic::error(word.span, error.to_string()))?;
        for text in &expanded.words {
            ports.extend(port(builder, code, text, word.span)?);
        }
    }
    builder.out.config.config.exposed_ports.extend(ports.iter().map(|port| (port.clone(), Empty {})));
    Ok(format!("EXPOSE {}", text::list(&ports)))
}

/// `[[ip:]host:]port[-port][/protocol]`; only the last part means anything.
fn port(builder: &mut Builder<'_>, code: &Code, written: &str, span: Span) -> Result<Vec<String>> {
    let invalid = |reason: String| {
        Diagnostic::error(span, format!("invalid port {written:?}: {reason}"))
            .hint("write `EXPOSE 8080`, `EXPOSE 53/udp` or `EXPOSE 8000-8010`")
    };
    let (mapping, port) = written.rsplit_once(':').map_or(("", written), |(mapping, port)| (mapping, port));
    let (range, protocol) = port.split_once('/').unwrap_or((port, ""));
    let lower = protocol.to_lowercase();
    let lower = if lower.is_empty() { "tcp" } else { &lower };
    if !matches!(lower, "tcp" | "udp" | "sctp") {
        return Err(invalid(format!("unknown protocol {protocol:?}")));
    }
    if protocol != protocol.to_lowercase() {
        let message = format!("Defined protocol '{written}' in EXPOSE instruction should be lowercase");
        builder.lint("ExposeProtoCasing", code, span, message);
    }
    let (first, last) = port_range(range).map_err(invalid)?;
    if !mapping.is_empty() {
        host_part(mapping, last - first).map_err(invalid)?;
        let message =
            format!("EXPOSE instruction should not define an IP address or host-port mapping, found '{written}'");
        builder.lint("ExposeInvalidFormat", code, span, message);
    }
    Ok((first..=last).map(|port| format!("{port}/{lower}")).collect())
}

fn host_part(mapping: &str, length: u16) -> Result<(), String> {
    let (address, host) = match mapping.rsplit_once(':') {
        Some((address, host)) => (Some(address), host),
        None => (None, mapping),
    };
    if let Some(address) = address.filter(|address| !address.is_empty()) {
        let bare = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
        bare.parse::<std::net::IpAddr>().map_err(|_| format!("invalid IP address {address:?}"))?;
    }
    if host.is_empty() {
        return Ok(());
    }
    let (first, last) = port_range(host)?;
    if length != 0 && last - first != length {
        return Err("the two ranges differ in length".to_owned());
    }
    Ok(())
}

fn port_range(text: &str) -> Result<(u16, u16), String> {
    let number = |text: &str| match text.parse::<u16>() {
        Ok(port) if !text.starts_with('+') => Ok(port),
        _ => Err(format!("{text:?} is not a port number (0 to 65535)")),
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    if last < first {
        return Err(format!("the range {text} ends before it starts"));
    }
    Ok((first, last))
}
