//! Paths as text, by Go's rules: nothing here looks at a file.

/// Go's `path.Clean`: the shortest path that means the same; `.` for none.
pub fn clean(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    match (rooted, parts.is_empty()) {
        (true, _) => format!("/{}", parts.join("/")),
        (false, true) => ".".to_owned(),
        (false, false) => parts.join("/"),
    }
}

/// `path` within `directory`: absolute, clean; an absolute `path` stands for itself.
pub fn join(directory: &str, path: &str) -> String {
    if path.starts_with('/') { clean(path) } else { clean(&format!("/{directory}/{path}")) }
}

/// A source path within its root: clean, relative, `""` for the root; `..` cannot leave.
pub fn confine(path: &str) -> String {
    clean(&format!("/{path}"))[1..].to_owned()
}

/// `COPY`'s destination: as [`join`], but a trailing `/` or `/.` stays a trailing slash.
pub fn destination(directory: &str, path: &str) -> String {
    let mut joined = join(directory, path);
    let directory = path.is_empty() || path == "." || path.ends_with("/") || path.ends_with("/.");
    if directory && joined != "/" {
        joined.push('/');
    }
    joined
}

/// The part after the last slash.
pub fn base(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_as_go_cleans_them() {
        for (path, expect) in [
            ("", "."),
            ("a/./b//c/", "a/b/c"),
            ("/../a", "/a"),
            ("../../a", "../../a"),
            ("a/..", "."),
            ("/", "/"),
            ("a/../../b", "../b"),
        ] {
            assert_eq!(clean(path), expect, "{path}");
        }
        for (path, expect) in [("../../etc", "etc"), ("/", ""), (".", ""), ("./a/../b/", "b"), ("a/../../*", "*")] {
            assert_eq!(confine(path), expect, "{path}");
        }
        for (path, expect) in [("x", "/w/x"), ("x/", "/w/x/"), (".", "/w/"), ("/", "/"), ("/a/.", "/a/"), ("", "/w/")] {
            assert_eq!(destination("/w", path), expect, "{path}");
        }
    }
}
