//! `COPY` and `ADD`: sources from a context, a stage, an image, a URL, a git commit or the file itself.

use forge_solver::graph::{Copy, CopySource, Owner, Selection, Unpack};

use super::Origin;
use forge_solver::pattern::Patterns;

use super::git::{self, GitSource};
use super::state::{Builder, Input, Result, Work};
use crate::diagnostic::{Diagnostic, Span};
use crate::expand::Expander;
use crate::instruction::{Code, Copy as CopyLine, Instruction, Word};
use crate::{ContextName, Remote, path};

pub fn copy(builder: &mut Builder<'_>, instruction: &Instruction, line: &CopyLine) -> Result<()> {
    let code = &instruction.code;
    let words = Words::expand(builder, code, line)?;
    let sources = Sources::sort(line, &words)?;
    if line.from.is_none() {
        warn_of_ignored(builder, code, line, &words);
    }
    let mut history = String::from(if line.add { "ADD" } else { "COPY" });
    if line.parents {
        history.push_str(" --parents");
    }
    for (flag, value) in [("chown", &words.chown), ("chmod", &words.chmod)] {
        if let Some(value) = value {
            history.push_str(&format!(" --{flag}={value}"));
        }
    }
    words.paths.iter().for_each(|(path, _)| history.push_str(&format!(" {path}")));
    line.inline.iter().for_each(|inline| history.push_str(&format!(" <<{}", inline.name)));
    history.push_str(&format!(" {} # buildkit", words.destination));

    let mut inputs = Vec::new();
    let mut from = Vec::new();
    if !sources.local.is_empty() {
        from.extend(local(builder, line, &sources.local, &mut inputs)?);
    }
    for remote in sources.remote {
        inputs.push(Input::Remote(remote));
        // Its path is known when the remote has answered.
        from.push(CopySource::Path { input: inputs.len(), path: String::new(), pivot: None });
    }
    for (inline, data) in line.inline.iter().zip(&words.bodies) {
        from.push(CopySource::Inline { name: inline.name.clone(), data: data.clone() });
    }
    let mut destination = path::destination(&builder.out.config.config.working_dir, &words.destination);
    if from.len() > 1 && !destination.ends_with('/') {
        destination.push('/');
    }
    // An archive of the context is unpacked, one from the network only if that is asked for.
    let unpack = line.unpack.unwrap_or(line.add && !sources.local.is_empty());
    let work = Copy {
        sources: from,
        destination,
        owner: words.chown.as_deref().map(owner),
        mode: words.chmod.clone(),
        parents: line.parents,
        exclude: line.exclude.clone(),
        unpack: if unpack { Unpack::Archives } else { Unpack::Never },
    };
    let shown = builder.shown(code, builder.expander(), &builder.out.scope);
    builder.step(code, history, (Work::Copy(work), inputs), &shown)
}

/// `user[:group]`.
pub fn owner(text: &str) -> Owner {
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group.to_owned()).filter(|group| !group.is_empty())),
        None => (text, None),
    };
    Owner { user: user.to_owned(), group }
}

/// The words of the instruction with their variables replaced.
struct Words {
    paths: Vec<(String, Span)>,
    bodies: Vec<String>,
    destination: String,
    chown: Option<String>,
    chmod: Option<String>,
    checksum: Option<(String, Span)>,
}

impl Words {
    fn expand(builder: &mut Builder<'_>, code: &Code, line: &CopyLine) -> Result<Words> {
        let flag = |builder: &mut Builder<'_>, word: &Option<Word>| match word {
            None => Ok(None),
            Some(word) => {
                let text = builder.expand(code, word)?;
                Ok(Some((text, word.span)).filter(|(text, _)| !text.is_empty()))
            }
        };
        let chown = flag(builder, &line.chown)?.map(|(text, _)| text);
        let chmod = flag(builder, &line.chmod)?;
        let checksum = flag(builder, &line.checksum)?;
        if let Some((mode, span)) = &chmod {
            check_mode(mode, *span)?;
        }
        let mut paths = Vec::with_capacity(line.paths.len());
        for word in &line.paths {
            paths.push((builder.expand(code, word)?, word.span));
        }
        let destination = builder.expand(code, &line.destination)?;
        // Quotes and line ends of a heredoc's body are its own.
        let raw = Expander { ignore_quotes: true, ..Expander::new('\\') };
        let mut bodies = Vec::with_capacity(line.inline.len());
        for inline in &line.inline {
            bodies.push(match inline.expand {
                true => builder.expand_with(code, &inline.body, inline.span, raw)?,
                false => inline.body.clone(),
            });
        }
        Ok(Words { paths, bodies, destination, chown, chmod: chmod.map(|(mode, _)| mode), checksum })
    }
}

/// Sources by what they are.
struct Sources<'a> {
    local: Vec<&'a str>,
    remote: Vec<Remote>,
}

impl<'a> Sources<'a> {
    fn sort(line: &CopyLine, words: &'a Words) -> Result<Sources<'a>> {
        let mut sources = Sources { local: Vec::new(), remote: Vec::new() };
        if let Some((_, span)) = &words.checksum
            && words.paths.len() != 1
        {
            return Err(Diagnostic::error(*span, "checksum can't be specified for multiple sources")
                .hint("write one ADD for each source"));
        }
        for (path, span) in &words.paths {
            let remote = match git::parse(path).map_err(|reason| Diagnostic::error(*span, reason))? {
                Some(source) => Some(git_remote(line, words, source, *span)?),
                None if is_http(path) => Some(http_remote(line, words, path)?),
                None => None,
            };
            match remote {
                Some(_) if !line.add => {
                    let message = format!("source can't be a URL for COPY: {path}");
                    return Err(Diagnostic::error(*span, message).hint("use ADD"));
                }
                Some(remote) => sources.remote.push(remote),
                None => sources.local.push(path),
            }
        }
        match &words.checksum {
            Some((_, span)) if !sources.local.is_empty() => {
                Err(Diagnostic::error(*span, "checksum requires HTTP(S) or Git sources"))
            }
            _ => Ok(sources),
        }
    }
}

fn is_http(path: &str) -> bool {
    path.starts_with("http://") || path.starts_with("https://")
}

fn http_remote(line: &CopyLine, words: &Words, url: &str) -> Result<Remote> {
    let checksum = match &words.checksum {
        None => None,
        Some((text, span)) => Some(text.parse().map_err(|error| Diagnostic::error(*span, format!("{error}")))?),
    };
    Ok(Remote::Http { url: url.to_owned(), checksum, unpack: line.unpack.unwrap_or(false) })
}

fn git_remote(line: &CopyLine, words: &Words, source: GitSource, span: Span) -> Result<Remote> {
    if let (Some(flag), Some(query)) = (line.keep_git_dir, source.keep_git_dir)
        && flag != query
    {
        return Err(Diagnostic::error(span, "inconsistent keep-git-dir configuration")
            .hint("the flag and the URL say different things"));
    }
    let checksum = match (&words.checksum, source.checksum) {
        (Some((flag, span)), Some(query)) if *flag != query => {
            return Err(Diagnostic::error(*span, format!("checksum mismatch {flag:?} != {query:?}")));
        }
        (Some((flag, _)), _) => Some(flag.clone()),
        (None, query) => query,
    };
    Ok(Remote::Git {
        url: source.url,
        reference: source.reference,
        subdir: source.subdir,
        keep_git_dir: source.keep_git_dir.or(line.keep_git_dir).unwrap_or(false),
        checksum,
        submodules: source.submodules.unwrap_or(true),
    })
}

/// Paths of a context, a stage or an image: one input for all of them.
fn local(builder: &Builder<'_>, line: &CopyLine, written: &[&str], inputs: &mut Vec<Input>) -> Result<Vec<CopySource>> {
    let sources: Vec<(String, Option<String>)> = written.iter().map(|path| split_pivot(path, line.parents)).collect();
    let files = |name: ContextName| {
        let mut paths: Vec<String> = sources.iter().map(|(path, _)| selected(path, line.parents)).collect();
        paths.sort();
        paths.dedup();
        // With `--parents` the patterns count from the pivot, which a selection does not know: the copy excludes.
        let exclude = if line.parents { Vec::new() } else { line.exclude.clone() };
        Input::Files(name, Selection { paths, exclude })
    };
    let stages = builder.shared.stages;
    inputs.push(match &line.from {
        None => files(ContextName::Main),
        Some(from) => {
            let found = stages
                .find(&from.text, true)
                .ok_or_else(|| Diagnostic::error(from.span, format!("unknown stage {:?}", from.text)))?;
            if !stages.readable(found, builder.index) {
                let (name, own) = (&from.text, &builder.state.name);
                let message =
                    format!("cannot copy from stage {name:?}, it needs to be defined before current stage {own:?}");
                return Err(Diagnostic::error(from.span, message).hint("move its FROM above this stage's"));
            }
            match &stages.states[found].origin {
                Origin::Files(name) if stages.states[found].instructions().next().is_none() => {
                    files(ContextName::Named(name.clone()))
                }
                _ => Input::State(found),
            }
        }
    });
    let input = inputs.len();
    Ok(sources.into_iter().map(|(path, pivot)| CopySource::Path { input, path, pivot }).collect())
}

/// What of a context a source may read. Only `--parents` knows `**`; the directory before it is taken then.
fn selected(path: &str, parents: bool) -> String {
    if !parents {
        return path.to_owned();
    }
    let deep = path.split('/').position(|part| part.contains("**")).unwrap_or(usize::MAX);
    path.split('/').take(deep).collect::<Vec<_>>().join("/")
}

/// A source within its root, and the part before `/./` where `--parents` gives that a meaning.
fn split_pivot(written: &str, parents: bool) -> (String, Option<String>) {
    match written.split_once("/./").filter(|_| parents) {
        None => (path::confine(written), None),
        Some((pivot, rest)) => {
            let pivot = path::confine(pivot);
            let rest = path::confine(rest);
            let whole = if pivot.is_empty() { rest } else { path::confine(&format!("{pivot}/{rest}")) };
            (whole, Some(pivot))
        }
    }
}

/// The patterns of an ignore file, if their answer for a path is final: one with `!` may take back part of a directory.
pub fn ignored(patterns: &[String]) -> Option<Patterns> {
    if patterns.is_empty() || patterns.iter().any(|pattern| pattern.starts_with('!')) {
        return None;
    }
    // A broken pattern is refused where the context is read.
    Patterns::new(patterns).ok()
}

fn warn_of_ignored(builder: &mut Builder<'_>, code: &Code, line: &CopyLine, words: &Words) {
    let verb = if line.add { "Add" } else { "Copy" };
    for (written, span) in words.paths.iter().filter(|(path, _)| !is_http(path)) {
        let Some(patterns) = &builder.shared.ignored else { return };
        let path = path::confine(written);
        let everything = |pattern: &String| matches!(pattern.as_str(), "*" | "**" | "**/*");
        let excluded = match path.is_empty() {
            true => builder.shared.request.ignore.iter().any(everything),
            false => patterns.excludes(&path),
        };
        if excluded {
            let shown = path::clean(written);
            let message = format!("Attempting to {verb} file {shown:?} that is excluded by .dockerignore");
            builder.lint("CopyIgnoredFile", code, *span, message);
        }
    }
}

/// An octal number up to 07777, or the symbolic form of chmod(1).
fn check_mode(mode: &str, span: Span) -> Result<()> {
    let error = || {
        let message = format!("invalid chmod parameter: {mode:?}");
        Diagnostic::error(span, message).hint("it is an octal number from 0 to 07777, or symbolic such as u=rwX,go=rX")
    };
    if mode.bytes().all(|b| b.is_ascii_digit()) {
        return match u32::from_str_radix(mode, 8) {
            Ok(0..=0o7777) => Ok(()),
            _ => Err(error()),
        };
    }
    let clause = |clause: &str| {
        let actions = clause.trim_start_matches(['u', 'g', 'o', 'a']);
        let mut parts = actions.split(['+', '-', '=']);
        let starts = parts.next() == Some("") && actions.starts_with(['+', '-', '=']);
        let permissions = |part: &str| {
            matches!(part, "u" | "g" | "o")
                || part.bytes().all(|b| matches!(b, b'r' | b'w' | b'x' | b'X' | b's' | b't'))
        };
        starts && parts.all(permissions)
    };
    if mode.split(',').all(clause) { Ok(()) } else { Err(error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_octal_and_symbolic() {
        for good in ["0", "755", "07777", "u+x", "a=rX,u+w", "go-w", "u=rwx,g=u", "+x", "u+rw-x", "o="] {
            assert!(check_mode(good, Span::default()).is_ok(), "{good}");
        }
        for bad in ["8", "10000", "u", "rwx", "u+q", "x+r", ",", "u+x,", "99999999999999"] {
            assert!(check_mode(bad, Span::default()).is_err(), "{bad}");
        }
    }

    #[test]
    fn pivots_split_only_with_parents() {
        assert_eq!(split_pivot("a/./b/*.c", true), ("a/b/*.c".to_owned(), Some("a".to_owned())));
        assert_eq!(split_pivot("a/./b", false), ("a/b".to_owned(), None));
        assert_eq!((selected("a/*/**/c", true), selected("**", true)), ("a/*".to_owned(), String::new()));
        assert_eq!(selected("a/**/c", false), "a/**/c");
        assert_eq!(split_pivot("../../x", true), ("x".to_owned(), None));
        assert_eq!(super::super::mount::literal("a[1]*"), "a\\[1]\\*");
    }
}
