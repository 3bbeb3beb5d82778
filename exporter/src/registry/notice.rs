//! What a registry says besides its answer: warnings, and how much of a rate limit is left.

use reqwest::header::{HeaderMap, WARNING};

use super::error::printable;

const WARNINGS_MAX: usize = 8;
const WARNING_LENGTH_MAX: usize = 300;

/// One line for each thing that a person should know.
pub(super) fn notices(host: &str, headers: &HeaderMap) -> Vec<String> {
    let warnings = headers.get_all(WARNING).iter().filter_map(|value| warning(value.to_str().ok()?)).take(WARNINGS_MAX);
    let mut lines: Vec<String> = warnings.map(|text| format!("{host} warns: {text}")).collect();
    lines.extend(rate_limit(headers).map(|text| format!("{host}: {text}")));
    lines
}

/// distribution-spec "Warnings": `299 - "text"`.
fn warning(value: &str) -> Option<String> {
    let text = value.strip_prefix("299 ")?.split_once(' ')?.1.trim().strip_prefix('"')?.strip_suffix('"')?;
    Some(printable(&text.replace("\\\"", "\""), WARNING_LENGTH_MAX)).filter(|text| !text.is_empty())
}

/// `RateLimit-Limit: 100;w=21600` and `RateLimit-Remaining: 9;w=21600`, when less than a tenth is left.
fn rate_limit(headers: &HeaderMap) -> Option<String> {
    let read = |name: &str| {
        let text = headers.get(name)?.to_str().ok()?;
        let (count, rest) = text.split_once(';').unwrap_or((text, ""));
        Some((count.trim().parse::<u64>().ok()?, rest.trim().strip_prefix("w=").and_then(|w| w.parse::<u64>().ok())))
    };
    let (limit, window) = read("ratelimit-limit")?;
    let (left, _) = read("ratelimit-remaining")?;
    let within = window.map_or_else(String::new, |seconds| format!(" within {} minutes", seconds.div_ceil(60)));
    (left < limit / 10).then(|| format!("{left} of {limit} requests are left{within}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_worth_saying() {
        for (headers, expect) in [
            (vec![("warning", r#"299 - "soon to be \"gone\"""#)], vec![r#"h warns: soon to be "gone""#]),
            (vec![("warning", "299 - unquoted"), ("warning", r#"199 - "other""#)], vec![]),
            (
                vec![("ratelimit-limit", "100;w=21600"), ("ratelimit-remaining", "9;w=21600")],
                vec!["h: 9 of 100 requests are left within 360 minutes"],
            ),
            (vec![("ratelimit-limit", "100;w=21600"), ("ratelimit-remaining", "90")], vec![]),
            (vec![("ratelimit-limit", "many"), ("ratelimit-remaining", "0")], vec![]),
        ] {
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                map.append(name, value.parse().unwrap());
            }
            assert_eq!(notices("h", &map), expect);
        }
    }
}
