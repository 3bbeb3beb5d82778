//! `.dockerignore` text to patterns. What they match is the business of `forge_solver::pattern`.

/// The patterns of an ignore file, cleaned, in order; `!` stays in front of those that take back.
///
/// moby's rules: a byte order mark is dropped; lines with `#` in the first column are comments; blanks around a pattern
/// do not count; a pattern is a clean path relative to the context, whether or not it was written with a leading `/`.
pub fn patterns(text: &str) -> Vec<String> {
    text.trim_start_matches('\u{feff}').lines().filter(|line| !line.starts_with('#')).filter_map(pattern).collect()
}

fn pattern(line: &str) -> Option<String> {
    let line = line.trim();
    let (mark, path) = match line.strip_prefix('!') {
        Some(rest) => ("!", rest.trim()),
        None => ("", line),
    };
    if line.is_empty() {
        return None;
    }
    if path.is_empty() {
        return Some(mark.to_owned());
    }
    let clean = crate::path::clean(path);
    let relative = clean.strip_prefix('/').filter(|rest| !rest.is_empty()).unwrap_or(&clean);
    Some(format!("{mark}{relative}"))
}

#[cfg(test)]
mod tests {
    use super::patterns;

    #[test]
    fn ignore_files_as_moby_reads_them() {
        let text = "\u{feff}# comment\n /a/b/ \n\n #not a comment\n!  /c//d/../e\n../f\n*\n/\n!\r\n**/*.md\t\n.";
        assert_eq!(patterns(text), ["a/b", "#not a comment", "!c/e", "../f", "*", "/", "!", "**/*.md", "."]);
    }
}
