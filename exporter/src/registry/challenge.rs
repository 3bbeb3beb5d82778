//! `WWW-Authenticate`: what a registry wants to see before it answers (RFC 9110 section 11, distribution "token auth").

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// The schemes that forge speaks; a registry may offer several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// A peer cannot make us parse without end.
const HEADER_MAX: usize = 8 * 1024;

/// The challenge to answer: bearer before basic, whatever else is offered (Negotiate, NTLM, …).
pub(super) fn choose(headers: &HeaderMap) -> Option<Challenge> {
    let all: Vec<Challenge> =
        headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok()).flat_map(parse).collect();
    let bearer = all.iter().find(|challenge| matches!(challenge, Challenge::Bearer { .. }));
    bearer.or(all.first()).cloned()
}

/// Every known challenge of one header. Malformed parts are left out, they are not errors.
fn parse(header: &str) -> Vec<Challenge> {
    let mut found = Vec::new();
    let mut scanner = Scanner(header.get(..HEADER_MAX).unwrap_or(header));
    let mut scheme = String::new();
    let mut parameters: Vec<(String, String)> = Vec::new();
    while let Some(word) = scanner.token() {
        match scanner.value() {
            Some(value) => parameters.push((word.to_ascii_lowercase(), value)),
            None => {
                found.extend(known(&scheme, &parameters));
                scheme = word.to_ascii_lowercase();
                parameters.clear();
            }
        }
    }
    found.extend(known(&scheme, &parameters));
    found
}

fn known(scheme: &str, parameters: &[(String, String)]) -> Option<Challenge> {
    let get = |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    match scheme {
        "basic" => Some(Challenge::Basic),
        "bearer" => {
            let non_empty = |text: &String| !text.is_empty();
            Some(Challenge::Bearer {
                realm: get("realm").filter(non_empty)?,
                service: get("service").filter(non_empty),
                scope: get("scope").filter(non_empty),
            })
        }
        _ => None,
    }
}

struct Scanner<'a>(&'a str);

impl Scanner<'_> {
    /// The next word; separators and stray characters are passed over.
    fn token(&mut self) -> Option<String> {
        let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/".contains(c);
        let start = self.0.find(is_token)?;
        let rest = &self.0[start..];
        let end = rest.find(|c| !is_token(c)).unwrap_or(rest.len());
        self.0 = &rest[end..];
        Some(rest[..end].to_owned())
    }

    /// `= value` or `= "value"`, if that is what follows.
    fn value(&mut self) -> Option<String> {
        let rest = self.0.trim_start().strip_prefix('=')?.trim_start();
        let Some(quoted) = rest.strip_prefix('"') else {
            let end = rest.find([',', ' ', '\t']).unwrap_or(rest.len());
            self.0 = &rest[end..];
            return Some(rest[..end].to_owned());
        };
        let mut value = String::new();
        let mut characters = quoted.char_indices();
        while let Some((at, c)) = characters.next() {
            match c {
                '"' => {
                    self.0 = &quoted[at + 1..];
                    return Some(value);
                }
                '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
                c => value.push(c),
            }
        }
        self.0 = "";
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        Challenge::Bearer { realm: realm.to_owned(), service: owned(service), scope: owned(scope) }
    }

    #[test]
    fn challenges() {
        for (header, expect) in [
            (
                r#"Bearer realm="https://a/t",service="s",scope="repository:x:pull,push""#,
                vec![bearer("https://a/t", Some("s"), Some("repository:x:pull,push"))],
            ),
            (r#"Basic realm="Registry Realm""#, vec![Challenge::Basic]),
            ("basic", vec![Challenge::Basic]),
            (r#"Negotiate, Basic realm="x, Bearer y=z""#, vec![Challenge::Basic]),
            (
                r#"Negotiate dG9rZW4=, bearer realm = https://a/t , Basic realm=x"#,
                vec![bearer("https://a/t", None, None), Challenge::Basic],
            ),
            (r#"Bearer realm="a\"b""#, vec![bearer("a\"b", None, None)]),
            (r#"Bearer realm="unclosed"#, vec![bearer("unclosed", None, None)]),
            (r#"Bearer service="no realm""#, vec![]),
            ("", vec![]),
            (",,==\"", vec![]),
        ] {
            assert_eq!(parse(header), expect, "{header}");
        }
    }

    #[test]
    fn bearer_is_preferred_over_basic() {
        let mut headers = HeaderMap::new();
        headers.append(WWW_AUTHENTICATE, r#"Basic realm="x""#.parse().unwrap());
        headers.append(WWW_AUTHENTICATE, r#"Bearer realm="https://t""#.parse().unwrap());
        assert_eq!(choose(&headers), Some(bearer("https://t", None, None)));
        assert_eq!(choose(&HeaderMap::new()), None);
    }

    proptest::proptest! {
        #[test]
        fn any_header_is_read_to_its_end(header in "([a-zA-Z=,\" \\\\é]|Bearer |realm=\"){0,60}") {
            for challenge in parse(&header) {
                let empty = matches!(challenge, Challenge::Bearer { realm, .. } if realm.is_empty());
                proptest::prop_assert!(!empty);
            }
        }
    }
}
