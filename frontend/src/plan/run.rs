//! `RUN`: the command, its heredocs, its environment.

use std::borrow::Cow;

use forge_solver::graph::{InlineFile, Network, Run, Security};

use super::config::with_shell;
use super::mount;
use super::scope::Variables;
use super::state::{Builder, Result, Work};
use crate::diagnostic::Diagnostic;
use crate::expand::Expander;
use crate::instruction::{CommandLine, Instruction, Run as RunLine};
use crate::lex;

/// Where a heredoc that is a program of its own is found.
const PROGRAM_DIRECTORY: &str = "/dev/pipes";
const HOSTNAME: &str = "buildkitsandbox";
/// Known without `ARG`, and in no key then.
pub const PROXIES: [&str; 5] = ["HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"];

pub fn run(builder: &mut Builder<'_>, instruction: &Instruction, line: &RunLine) -> Result<()> {
    let code = &instruction.code;
    if let Some(device) = line.devices.first() {
        return Err(Diagnostic::error(device.span, "RUN --device is not supported")
            .hint("take the flag out; devices are not part of what a build can be repeated with"));
    }
    let Command { args, files, summary } = command(builder, instruction, line)?;
    let mounts = mount::mounts(builder, code, &line.mounts)?;
    let mut env = builder.out.scope.clone();
    if let Some(socket) = mounts.ssh_socket
        && !env.iter().any(|(name, _)| name == "SSH_AUTH_SOCK")
    {
        env.push(("SSH_AUTH_SOCK".to_owned(), socket));
    }
    let request = builder.shared.request;
    let config = &builder.out.config.config;
    let work = Run {
        args: args.clone(),
        env,
        cwd: if config.working_dir.is_empty() { "/".to_owned() } else { config.working_dir.clone() },
        user: config.user.clone(),
        network: match line.network.as_ref().map(|word| word.text.as_str()) {
            Some("host") => Network::Host,
            Some("none") => Network::None,
            _ => request.network,
        },
        security: match line.security.as_ref().map(|word| word.text.as_str()) {
            Some("insecure") => Security::Insecure,
            _ => Security::Sandbox,
        },
        mounts: mounts.mounts,
        files,
        hosts: request.hosts.clone(),
        hostname: request
            .build_args
            .get("BUILDKIT_SANDBOX_HOSTNAME")
            .filter(|name| !name.is_empty())
            .cloned()
            .unwrap_or_else(|| HOSTNAME.to_owned()),
        platform: builder.out.platform.clone(),
        unkeyed: unkeyed(builder),
    };
    let history = history(builder, &args);
    let shown = shown(builder, instruction, &mounts.secret_names) + &summary;
    builder.step(code, history, (Work::Run(Box::new(work)), mounts.inputs), &shown)
}

struct Command {
    args: Vec<String>,
    files: Vec<InlineFile>,
    /// What is shown of a heredoc.
    summary: String,
}

fn command(builder: &Builder<'_>, instruction: &Instruction, line: &RunLine) -> Result<Command> {
    let plain = |args| Command { args, files: Vec::new(), summary: String::new() };
    let text = match &line.command {
        CommandLine::Exec(args) if args.is_empty() => {
            return Err(Diagnostic::error(instruction.code.span, "RUN [] names no program"));
        }
        CommandLine::Exec(args) => return Ok(plain(args.clone())),
        CommandLine::Shell(word) => &word.text,
    };
    let Some(first) = line.heredocs.first() else { return Ok(plain(with_shell(builder, text))) };
    if lex::parse_heredoc(text).is_none() {
        // More than one lone heredoc: the shell gets command and bodies as they stand.
        let mut script = text.clone();
        for heredoc in &line.heredocs {
            script.push('\n');
            script.push_str(&heredoc.content);
            script.push_str(&heredoc.name);
        }
        return Ok(plain(with_shell(builder, &script)));
    }
    let body = first.body();
    let summary = summary(&first.content);
    if !body.starts_with("#!") {
        return Ok(Command { summary, ..plain(with_shell(builder, &body)) });
    }
    let path = format!("{PROGRAM_DIRECTORY}/{}", crate::path::confine(&first.name));
    let files = vec![InlineFile { path: path.clone(), data: body, mode: 0o755 }];
    // BuildKit puts the shell in front of the path.
    Ok(Command { args: with_shell(builder, &path), files, summary })
}

fn summary(body: &str) -> String {
    let mut lines = body.trim().lines();
    let first = lines.next().unwrap_or_default();
    let more = if lines.next().is_some() { "..." } else { "" };
    format!(" ({first}{more})")
}

/// `RUN |2 A=1 B= /bin/sh -c make # buildkit`
fn history(builder: &Builder<'_>, args: &[String]) -> String {
    let mut arguments: Vec<(&str, String)> = Vec::new();
    for (name, value) in &builder.out.arguments {
        let now = builder.out.scope.iter().find(|(key, _)| key == name).map(|(_, value)| value);
        let value = now.or(value.as_ref()).cloned().unwrap_or_default();
        match arguments.iter_mut().find(|(key, _)| key == name) {
            Some(known) => known.1 = value,
            None => arguments.push((name, value)),
        }
    }
    let mut words = vec!["RUN".to_owned()];
    if !arguments.is_empty() {
        words.push(format!("|{}", arguments.len()));
        words.extend(arguments.into_iter().map(|(name, value)| format!("{name}={value}")));
    }
    words.extend(args.iter().cloned());
    words.join(" ") + " # buildkit"
}

/// Variables that the builder knows are filled in, the shell's own stay, secrets are masked.
fn shown(builder: &Builder<'_>, instruction: &Instruction, secrets: &[String]) -> String {
    let mut scope: Cow<'_, Variables> = Cow::Borrowed(&builder.out.scope);
    for name in secrets {
        super::scope::set(scope.to_mut(), name, "****");
    }
    let expander = Expander { keep_quotes: true, keep_unset: true, ..builder.expander() };
    builder.shown(&instruction.code, expander, &scope)
}

/// What the request passes through, and the proxies that no `ARG` declares.
fn unkeyed(builder: &Builder<'_>) -> forge_solver::graph::Unkeyed {
    let mut unkeyed = builder.shared.request.unkeyed.clone();
    for (name, value) in &builder.shared.request.build_args {
        let upper = name.to_uppercase();
        if !PROXIES.contains(&upper.as_str()) {
            continue;
        }
        for name in [upper.clone(), upper.to_lowercase()] {
            unkeyed.proxy_env.retain(|(key, _)| *key != name);
            unkeyed.proxy_env.push((name, value.clone()));
        }
    }
    let scope = &builder.out.scope;
    unkeyed.proxy_env.retain(|(name, _)| !scope.iter().any(|(key, _)| key == name));
    unkeyed
}
