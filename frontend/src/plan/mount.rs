//! `RUN --mount`: the five types and their options, refused as BuildKit refuses them.

use forge_solver::graph::{Mount, MountKind, Selection, Sharing};

use super::state::{Builder, Input, Result};
use super::{Origin, parse_bool};
use crate::ContextName;
use crate::diagnostic::{Diagnostic, Span};
use crate::instruction::{Code, MountFlag};
use crate::path;

const TYPES: [&str; 5] = ["bind", "cache", "tmpfs", "secret", "ssh"];
const SHARING: [&str; 3] = ["shared", "private", "locked"];
const KEYS: [&str; 19] = [
    "type",
    "from",
    "source",
    "target",
    "readonly",
    "id",
    "sharing",
    "required",
    "size",
    "mode",
    "uid",
    "gid",
    "src",
    "dst",
    "destination",
    "ro",
    "rw",
    "readwrite",
    "env",
];

/// The mounts of one RUN.
#[derive(Default)]
pub struct Mounts {
    pub mounts: Vec<Mount>,
    /// What they read; input 0 of the step is its root, so the first of these is input 1.
    pub inputs: Vec<Input>,
    /// The environment variables that hold secrets.
    pub secret_names: Vec<String>,
    /// Where the first agent socket is.
    pub ssh_socket: Option<String>,
}

pub fn mounts(builder: &mut Builder<'_>, code: &Code, flags: &[MountFlag]) -> Result<Mounts> {
    let mut mounts = Mounts::default();
    for flag in flags {
        let options = Options::read(builder, code, flag)?;
        let mount = match options.kind.as_str() {
            "cache" => cache(builder, &mut mounts, &options)?,
            "tmpfs" => Mount { target: options.target(builder)?, kind: MountKind::Tmpfs { size_bytes: options.size } },
            "secret" => secret(builder, &mut mounts, &options)?,
            "ssh" => ssh(builder, &mut mounts, &options)?,
            _ => bind(builder, &mut mounts, &options)?,
        };
        mounts.mounts.push(mount);
    }
    Ok(mounts)
}

impl Mounts {
    /// The number of an input of the step.
    fn input(&mut self, input: Input) -> usize {
        let known = self.inputs.iter().position(|known| *known == input);
        1 + known.unwrap_or_else(|| {
            self.inputs.push(input);
            self.inputs.len() - 1
        })
    }
}

/// `--mount`'s fields with their variables replaced.
#[derive(Default)]
struct Options {
    span: Span,
    kind: String,
    from: String,
    source: String,
    target: String,
    readonly: Option<bool>,
    size: Option<u64>,
    id: String,
    sharing: Option<Sharing>,
    required: bool,
    env: Option<String>,
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
}

impl Options {
    fn read(builder: &mut Builder<'_>, code: &Code, flag: &MountFlag) -> Result<Options> {
        let mut options = Options { span: flag.span, kind: "bind".to_owned(), ..Options::default() };
        for (key, value) in &flag.fields {
            match value {
                None => options.word(key)?,
                // Known before anything else is, so it cannot hold variables.
                Some(value) if key == "from" => options.from.clone_from(value),
                Some(value) => {
                    let value = builder.expand_with(code, value, flag.span, builder.expander())?;
                    options.set(key, value)?;
                }
            }
        }
        options.check()?;
        Ok(options)
    }

    fn error(&self, message: impl Into<String>) -> Diagnostic {
        Diagnostic::error(self.span, message)
    }

    /// A key without a value.
    fn word(&mut self, key: &str) -> Result<()> {
        match key {
            "readonly" | "ro" => self.readonly = Some(true),
            "readwrite" | "rw" => self.readonly = Some(false),
            "required" => self.set(key, "true".to_owned())?,
            _ if KEYS.contains(&key) => {
                return Err(self
                    .error(format!("--mount: {key:?} must be a key=value pair"))
                    .hint(format!("write `{key}=…`")));
            }
            _ => return Err(self.error(format!("--mount: unexpected key {key:?}")).suggest(key, KEYS)),
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: String) -> Result<()> {
        let invalid =
            |value: &str| Diagnostic::error(self.span, format!("--mount: invalid value for {key}: {value:?}"));
        match key {
            "type" => {
                self.kind = value.to_lowercase();
                if !TYPES.contains(&self.kind.as_str()) {
                    let error = self.error(format!("unsupported mount type {value:?}"));
                    return Err(error.hint(format!("it can be {}", TYPES.join(", "))).suggest(&self.kind, TYPES));
                }
            }
            "source" | "src" => self.source = value,
            "target" | "dst" | "destination" => self.target = value,
            "readonly" | "ro" => self.readonly = Some(parse_bool(&value).ok_or_else(|| invalid(&value))?),
            "readwrite" | "rw" => self.readonly = Some(!parse_bool(&value).ok_or_else(|| invalid(&value))?),
            "required" if matches!(self.kind.as_str(), "secret" | "ssh") => {
                self.required = parse_bool(&value).ok_or_else(|| invalid(&value))?;
            }
            "size" if self.kind == "tmpfs" => self.size = Some(bytes(&value).ok_or_else(|| invalid(&value))?),
            "required" | "size" => {
                let message = format!("--mount: unexpected key {key:?} for mount type {:?}", self.kind);
                return Err(self.error(message).hint("`type=` must come before it"));
            }
            "id" => self.id = value,
            "sharing" => self.sharing = Some(self.sharing_mode(&value)?),
            "mode" => {
                let octal = |c: char| c.is_digit(8);
                let mode = u32::from_str_radix(&value, 8).ok().filter(|_| value.chars().all(octal));
                self.mode = Some(mode.ok_or_else(|| invalid(&value).hint("write it in octal, such as 0755"))?);
            }
            "uid" => self.uid = Some(value.parse().map_err(|_| invalid(&value))?),
            "gid" => self.gid = Some(value.parse().map_err(|_| invalid(&value))?),
            "env" => self.env = Some(value),
            _ => return Err(self.error(format!("--mount: unexpected key {key:?}")).suggest(key, KEYS)),
        }
        Ok(())
    }

    fn sharing_mode(&self, value: &str) -> Result<Sharing> {
        match value.to_lowercase().as_str() {
            "shared" => Ok(Sharing::Shared),
            "private" => Ok(Sharing::Private),
            "locked" => Ok(Sharing::Locked),
            other => {
                let error = self.error(format!("unsupported sharing value {value:?}"));
                Err(error.hint(format!("it can be {}", SHARING.join(", "))).suggest(other, SHARING))
            }
        }
    }

    /// What the type does not allow.
    fn check(&self) -> Result<()> {
        let kind = self.kind.as_str();
        if !matches!(kind, "cache" | "secret" | "ssh") {
            let set = [("mode", self.mode), ("uid", self.uid), ("gid", self.gid)];
            if let Some((name, _)) = set.iter().find(|(_, value)| value.is_some()) {
                return Err(self.error(format!("{name} is not allowed for {kind} mounts")));
            }
        }
        if self.sharing.is_some() && kind != "cache" {
            return Err(self.error(format!("sharing is not allowed for {kind} mounts")));
        }
        match kind {
            "secret" if !self.from.is_empty() => Err(self.error("a secret mount should not have a from")),
            "secret" if !self.source.is_empty() && !self.id.is_empty() => {
                Err(self.error("both source and id can't be set").hint("they mean the same: keep id"))
            }
            "secret" if self.source.is_empty() && self.target.is_empty() && self.id.is_empty() => {
                Err(self.error("invalid secret mount: it names no secret").hint("write `id=…`"))
            }
            "ssh" if !self.source.is_empty() => Err(self.error("ssh does not support source")),
            _ => Ok(()),
        }
    }

    fn target(&self, builder: &Builder<'_>) -> Result<String> {
        self.resolve(builder, &self.target)
    }

    /// A mount point: absolute, clean, not the root. Without a target it is the working directory.
    fn resolve(&self, builder: &Builder<'_>, target: &str) -> Result<String> {
        let resolved = path::join(&builder.out.config.config.working_dir, target);
        if resolved == "/" {
            let message = format!("invalid mount target {target:?}");
            return Err(self.error(message).hint("write `target=/some/directory`"));
        }
        Ok(resolved)
    }
}

/// What a mount reads: a stage, an image, or files of a context.
fn input(builder: &Builder<'_>, options: &Options, source: &str) -> Result<Input> {
    let stages = builder.shared.stages;
    let context = |name| {
        let paths = vec![literal(source)];
        Input::Files(name, Selection { paths, exclude: Vec::new() })
    };
    if options.from.is_empty() {
        return Ok(context(ContextName::Main));
    }
    let found =
        stages.find(&options.from, false).ok_or_else(|| options.error(format!("unknown stage {:?}", options.from)))?;
    if !stages.readable(found, builder.index) {
        let (name, target) = (&options.from, &options.target);
        let message =
            format!("cannot mount from stage {name:?} to {target:?}, stage needs to be defined before current command");
        return Err(options.error(message).hint("move its FROM above this stage's"));
    }
    Ok(match &stages.states[found].origin {
        Origin::Files(name) if stages.states[found].instructions().next().is_none() => {
            context(ContextName::Named(name.clone()))
        }
        _ => Input::State(found),
    })
}

/// A path as a pattern that matches just it.
pub fn literal(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for c in path.chars() {
        if matches!(c, '*' | '?' | '[' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

fn bind(builder: &Builder<'_>, mounts: &mut Mounts, options: &Options) -> Result<Mount> {
    let source = path::confine(&options.source);
    let input = mounts.input(input(builder, options, &source)?);
    let kind = MountKind::Bind { input, source, readonly: options.readonly.unwrap_or(true) };
    Ok(Mount { target: options.target(builder)?, kind })
}

fn cache(builder: &Builder<'_>, mounts: &mut Mounts, options: &Options) -> Result<Mount> {
    let source = path::confine(&options.source);
    // A cache starts empty unless it says what from.
    let seed = match options.from.is_empty() {
        true => None,
        false => Some(mounts.input(input(builder, options, &source)?)),
    };
    let id = if options.id.is_empty() { path::clean(&options.target) } else { options.id.clone() };
    let namespace = builder.shared.request.build_args.get("BUILDKIT_CACHE_MOUNT_NS").filter(|name| !name.is_empty());
    let kind = MountKind::Cache {
        id: namespace.map_or_else(|| id.clone(), |namespace| format!("{namespace}/{id}")),
        sharing: options.sharing.unwrap_or_default(),
        input: seed,
        source,
        mode: options.mode.unwrap_or(0o755),
        uid: options.uid.unwrap_or(0),
        gid: options.gid.unwrap_or(0),
        readonly: options.readonly.unwrap_or(false),
    };
    Ok(Mount { target: options.target(builder)?, kind })
}

fn secret(builder: &Builder<'_>, mounts: &mut Mounts, options: &Options) -> Result<Mount> {
    let given = [&options.source, &options.id].into_iter().find(|id| !id.is_empty());
    let id = given.cloned().unwrap_or_else(|| path::base(&options.target).to_owned());
    let target = match options.target.is_empty() {
        true => format!("/run/secrets/{}", path::base(&id)),
        false => options.target.clone(),
    };
    // `env=` alone: the variable is called as the secret is.
    let env = options.env.clone().map(|name| if name.is_empty() { id.clone() } else { name });
    mounts.secret_names.extend(env.clone());
    let kind = MountKind::Secret {
        id,
        env,
        file: options.env.is_none() || !options.target.is_empty(),
        required: options.required,
        mode: options.mode.unwrap_or(0o400),
        uid: options.uid.unwrap_or(0),
        gid: options.gid.unwrap_or(0),
    };
    Ok(Mount { target: options.resolve(builder, &target)?, kind })
}

fn ssh(builder: &Builder<'_>, mounts: &mut Mounts, options: &Options) -> Result<Mount> {
    let number = mounts.mounts.iter().filter(|mount| matches!(mount.kind, MountKind::Ssh { .. })).count();
    let target = match options.target.is_empty() {
        true => format!("/run/buildkit/ssh_agent.{number}"),
        false => options.resolve(builder, &options.target)?,
    };
    mounts.ssh_socket.get_or_insert_with(|| target.clone());
    let kind = MountKind::Ssh {
        id: if options.id.is_empty() { "default".to_owned() } else { options.id.clone() },
        required: options.required,
        mode: options.mode.unwrap_or(0o600),
        uid: options.uid.unwrap_or(0),
        gid: options.gid.unwrap_or(0),
    };
    Ok(Mount { target, kind })
}

/// `100`, `64m`, `1.5GiB`: powers of 1024, as docker reads sizes.
fn bytes(text: &str) -> Option<u64> {
    let lower = text.trim().to_lowercase();
    let end = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(end);
    let unit = unit.trim_start().trim_end_matches('b').trim_end_matches('i');
    let power = match unit {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        _ => return None,
    };
    let number: f64 = number.parse().ok()?;
    let bytes = number * 1024f64.powi(power);
    (bytes.is_finite() && bytes < 2f64.powi(63)).then_some(bytes as u64)
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_as_docker_reads_them() {
        for (text, expect) in [
            ("100", Some(100)),
            ("64m", Some(64 << 20)),
            ("1.5GiB", Some(3 << 29)),
            ("2 KB", Some(2048)),
            ("1x", None),
            ("", None),
            ("m", None),
        ] {
            assert_eq!(super::bytes(text), expect, "{text}");
        }
    }
}
