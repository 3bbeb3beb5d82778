//! From the path an instruction names to the files it means: wildcards and links, within a root.
//!
//! The same rules serve a directory on disk and a [`super::Tree`] in memory, through [`Names`]:
//! links on the way are followed, the last component too (as BuildKit does for `COPY`), an absolute or climbing target
//! counts from the root and never leaves it; what a wildcard passes on its way is not followed. With `parents`,
//! `**` crosses directories and the last component is taken as it is, because the links are what is copied.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::pattern::{Glob, InvalidPattern, Patterns, clean, has_wildcards, unquote};

/// As many links as BuildKit follows before it calls them a loop.
const LINKS_MAX: usize = 255;

/// What there is at a path.
#[derive(Debug, PartialEq)]
pub(crate) enum Found {
    Directory,
    Link(PathBuf),
    Other,
}

/// A tree of names: real paths only, `""` for the root, no link is followed.
pub(crate) trait Names {
    fn find(&self, path: &Path) -> io::Result<Option<Found>>;
    /// Sorted.
    fn list(&self, directory: &Path) -> io::Result<Vec<OsString>>;
}

#[derive(Debug, PartialEq)]
pub(crate) struct Selected {
    /// As the instruction would call it; its last component names the copy.
    pub named: PathBuf,
    /// Where it is, all links followed.
    pub real: PathBuf,
    /// The part of `named` that a wildcard matched: what `--exclude` is tried on.
    pub matched: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum SelectError {
    #[error(transparent)]
    Pattern(#[from] InvalidPattern),
    #[error("{}: too many levels of symbolic links", .0.display())]
    Loop(PathBuf),
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// What `path` selects, in order. Nothing for a plain path means that it is missing. Adds the links that were followed.
pub(crate) fn select(
    names: &impl Names,
    path: &str,
    parents: bool,
    links: &mut Vec<PathBuf>,
) -> Result<Vec<Selected>, SelectError> {
    let path = clean(path);
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let plain = parts.iter().position(|part| has_wildcards(part)).unwrap_or(parts.len());
    let prefix: PathBuf = parts[..plain].iter().map(|part| unquote(part)).collect();
    let rest = &parts[plain..];
    if rest.is_empty() {
        let real = if parents { resolve_parent(names, &prefix, links)? } else { resolve(names, &prefix, links)? };
        return Ok(real.map(|real| Selected { named: prefix, real, matched: None }).into_iter().collect());
    }
    let Some(real) = resolve(names, &prefix, links)? else { return Ok(Vec::new()) };
    let matches = if parents { match_deep(names, &real, &rest.join("/"))? } else { match_parts(names, &real, rest)? };
    let mut selected = Vec::with_capacity(matches.len());
    for matched in matches {
        let at = real.join(&matched);
        let found = if parents { Some(at) } else { resolve(names, &at, links)? };
        // A dangling link among what a wildcard matched is passed over.
        selected.extend(found.map(|real| Selected { named: prefix.join(&matched), real, matched: Some(matched) }));
    }
    Ok(selected)
}

/// The real path, with every link followed inside the root; `None` where there is nothing.
pub(crate) fn resolve(
    names: &impl Names,
    path: &Path,
    links: &mut Vec<PathBuf>,
) -> Result<Option<PathBuf>, SelectError> {
    walk(names, path, links, Missing::IsNothing)
}

/// The same where something is about to be made: what is missing is taken by its name.
pub(crate) fn resolve_new(names: &impl Names, path: &Path) -> Result<PathBuf, SelectError> {
    Ok(walk(names, path, &mut Vec::new(), Missing::IsNew)?.unwrap_or_default())
}

#[derive(Clone, Copy, PartialEq)]
enum Missing {
    IsNothing,
    IsNew,
}

fn walk(
    names: &impl Names,
    path: &Path,
    links: &mut Vec<PathBuf>,
    missing: Missing,
) -> Result<Option<PathBuf>, SelectError> {
    let mut todo: VecDeque<OsString> = path.components().map(|part| part.as_os_str().to_owned()).collect();
    let mut real = PathBuf::new();
    let mut followed = 0;
    while let Some(part) = todo.pop_front() {
        match Path::new(&part).components().next() {
            Some(Component::ParentDir) => drop(real.pop()),
            Some(Component::RootDir) => real = PathBuf::new(),
            Some(Component::Normal(name)) => {
                let at = real.join(name);
                match find(names, &at)? {
                    None | Some(Found::Other) if missing == Missing::IsNew => real = at,
                    None => return Ok(None),
                    Some(Found::Link(target)) => {
                        followed += 1;
                        if followed > LINKS_MAX {
                            return Err(SelectError::Loop(path.to_owned()));
                        }
                        for part in target.components().rev() {
                            todo.push_front(part.as_os_str().to_owned());
                        }
                        links.push(at);
                    }
                    Some(Found::Directory) => real = at,
                    Some(Found::Other) if todo.is_empty() => real = at,
                    Some(Found::Other) => return Ok(None),
                }
            }
            _ => (),
        }
    }
    Ok(Some(real))
}

/// The same, but the last component stays what it is.
fn resolve_parent(names: &impl Names, path: &Path, links: &mut Vec<PathBuf>) -> Result<Option<PathBuf>, SelectError> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(Some(PathBuf::new())) };
    let Some(real) = resolve(names, parent, links)? else { return Ok(None) };
    let at = real.join(name);
    Ok(find(names, &at)?.map(|_| at))
}

/// Go's `filepath.Match`, component by component (a `*` stops at `/` anyway).
fn match_parts(names: &impl Names, base: &Path, parts: &[&str]) -> Result<Vec<PathBuf>, SelectError> {
    let globs = parts.iter().map(|part| Glob::new(part)).collect::<Result<Vec<_>, _>>()?;
    let mut matched = vec![PathBuf::new()];
    for glob in globs {
        let mut next = Vec::new();
        for directory in matched {
            for name in list_if_directory(names, &base.join(&directory))? {
                if glob.matches(&name.to_string_lossy()) {
                    next.push(directory.join(name));
                }
            }
        }
        matched = next;
    }
    Ok(matched)
}

/// Everything that the pattern matches and whose parents it does not.
fn match_deep(names: &impl Names, base: &Path, pattern: &str) -> Result<Vec<PathBuf>, SelectError> {
    let patterns = Patterns::new([pattern])?;
    let depth = if pattern.contains("**") { usize::MAX } else { pattern.split('/').count() };
    let (mut matched, mut todo) = (Vec::new(), vec![(PathBuf::new(), 0)]);
    while let Some((directory, level)) = todo.pop() {
        for name in list_if_directory(names, &base.join(&directory))? {
            let path = directory.join(name);
            if patterns.excludes(&path.to_string_lossy()) {
                matched.push(path);
            } else if level + 1 < depth {
                todo.push((path, level + 1));
            }
        }
    }
    matched.sort();
    Ok(matched)
}

fn list_if_directory(names: &impl Names, path: &Path) -> Result<Vec<OsString>, SelectError> {
    let context = |source| SelectError::Io { path: path.to_owned(), source };
    match find(names, path)? {
        Some(Found::Directory) => names.list(path).map_err(context),
        _ => Ok(Vec::new()),
    }
}

fn find(names: &impl Names, path: &Path) -> Result<Option<Found>, SelectError> {
    if path.as_os_str() == OsStr::new("") {
        return Ok(Some(Found::Directory));
    }
    names.find(path).map_err(|source| SelectError::Io { path: path.to_owned(), source })
}
