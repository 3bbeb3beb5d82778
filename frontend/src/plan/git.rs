//! Git repositories as sources: `https://host/repo.git#ref:dir`, `git@host:repo`, `ssh://…`, with BuildKit's query keys.

use url::Url;

use super::parse_bool;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GitSource {
    pub url: String,
    pub reference: Option<String>,
    pub subdir: Option<String>,
    pub checksum: Option<String>,
    pub keep_git_dir: Option<bool>,
    pub submodules: Option<bool>,
}

/// `None` where the text is no git repository: a path, or a URL of a file.
pub fn parse(text: &str) -> Result<Option<GitSource>, String> {
    let scheme = text.split_once("://").map(|(scheme, _)| scheme);
    match scheme {
        Some("http" | "https" | "git" | "ssh") => from_url(text, scheme.unwrap_or_default()),
        Some(_) => Ok(None),
        None => Ok(from_scp(text)),
    }
}

/// `user@host:path[#ref[:dir]]`.
fn from_scp(text: &str) -> Option<GitSource> {
    let (user, rest) = text.split_once('@')?;
    let (host, _) = rest.split_once(':')?;
    let word = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    if !word(user) || !word(host) {
        return None;
    }
    let (url, fragment) = text.split_once('#').unwrap_or((text, ""));
    let mut source = GitSource { url: url.to_owned(), ..GitSource::default() };
    source.fragment(fragment);
    Some(source)
}

fn from_url(text: &str, scheme: &str) -> Result<Option<GitSource>, String> {
    let Ok(mut url) = Url::parse(text) else { return Ok(None) };
    // A URL of a file is no repository; over http the name tells.
    if matches!(scheme, "http" | "https") && !url.path().ends_with(".git") {
        return Ok(None);
    }
    let fragment = url.fragment().unwrap_or_default().to_owned();
    let pairs: Vec<(String, String)> = url.query_pairs().map(|(k, v)| (k.into_owned(), v.into_owned())).collect();
    url.set_fragment(None);
    url.set_query(None);
    let mut source = GitSource { url: url.into(), ..GitSource::default() };
    source.fragment(&fragment);
    for (index, (key, value)) in pairs.iter().enumerate() {
        if pairs[..index].iter().any(|(earlier, _)| earlier == key) {
            return Err(format!("query {key:?} has multiple values"));
        }
        source.query(key, value)?;
    }
    Ok(Some(source))
}

impl GitSource {
    fn fragment(&mut self, fragment: &str) {
        let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        self.reference = some(reference);
        self.subdir = some(subdir);
    }

    fn query(&mut self, key: &str, value: &str) -> Result<(), String> {
        let switch = || match value {
            "" => Ok(Some(true)),
            value => parse_bool(value).map(Some).ok_or_else(|| format!("invalid {key} value: {value:?}")),
        };
        if value.is_empty() && !matches!(key, "submodules" | "keep-git-dir" | "fetch-by-commit") {
            return Err(format!("query {key:?} has no value"));
        }
        let prefixed = |prefix: &str| match value.starts_with(prefix) {
            true => value.to_owned(),
            false => format!("{prefix}{value}"),
        };
        match key {
            "ref" => conflict(&mut self.reference, "ref", value.to_owned()),
            "tag" => conflict(&mut self.reference, "ref", prefixed("refs/tags/")),
            "branch" => conflict(&mut self.reference, "ref", prefixed("refs/heads/")),
            "subdir" => conflict(&mut self.subdir, "subdir", value.to_owned()),
            "checksum" | "commit" => conflict(&mut self.checksum, "checksum", value.to_owned()),
            "keep-git-dir" => switch().map(|on| self.keep_git_dir = on),
            "submodules" => switch().map(|on| self.submodules = on),
            "fetch-by-commit" => switch().map(|_| ()),
            "mtime" if matches!(value, "checkout" | "commit") => Ok(()),
            "mtime" => Err(format!("invalid mtime value: {value:?}: it is checkout or commit")),
            _ => Err(format!("unexpected query {key:?}")),
        }
    }
}

fn conflict(slot: &mut Option<String>, name: &str, value: String) -> Result<(), String> {
    match slot {
        Some(old) if *old != value => Err(format!("{name} conflicts: {old:?} vs {value:?}")),
        _ => {
            *slot = Some(value);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, url: &str, reference: Option<&str>, subdir: Option<&str>) {
        let source = parse(text).unwrap().unwrap_or_else(|| panic!("{text}"));
        assert_eq!(
            (source.url.as_str(), source.reference.as_deref(), source.subdir.as_deref()),
            (url, reference, subdir)
        );
    }

    #[test]
    fn repositories_and_what_is_none() {
        check("https://h/a.git", "https://h/a.git", None, None);
        check("https://h/a.git#v1:sub/dir", "https://h/a.git", Some("v1"), Some("sub/dir"));
        check("https://h/a.git?tag=v1&subdir=x", "https://h/a.git", Some("refs/tags/v1"), Some("x"));
        check("git@h:a/b.git#:d", "git@h:a/b.git", None, Some("d"));
        check("ssh://git@h/a#b", "ssh://git@h/a", Some("b"), None);
        for none in ["https://h/a.tar.gz", "a/b", "./x@y:z", "file.git", "dir/git@h:a", "http://["] {
            assert_eq!(parse(none), Ok(None), "{none}");
        }
        for bad in
            ["https://h/a.git?x=1", "https://h/a.git?tag=a&branch=b", "https://h/a.git?ref=", "https://h/a.git?ref=a#b"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
