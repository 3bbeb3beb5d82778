//! Durations as Go reads and prints them: `1h2m3.5s`, `300ms`.

const UNITS: [(&str, i64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Nanoseconds; `None` for what Go's `time.ParseDuration` refuses.
pub fn parse(text: &str) -> Option<i64> {
    let (negative, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut total: i64 = 0;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (digits, after) = rest.split_at(number);
        let end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let (_, scale) = UNITS.iter().find(|(name, _)| *name == unit)?;
        total = total.checked_add(scaled(digits, *scale)?)?;
        rest = after;
    }
    Some(if negative { -total } else { total })
}

fn scaled(digits: &str, scale: i64) -> Option<i64> {
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let whole = if whole.is_empty() { 0 } else { whole.parse::<i64>().ok()?.checked_mul(scale)? };
    // Digits below a nanosecond do not count.
    let (mut part, mut unit) = (0, scale);
    for digit in fraction.bytes() {
        unit /= 10;
        part += i64::from(digit - b'0') * unit;
    }
    whole.checked_add(part)
}

/// As Go's `Duration.String`.
pub fn format(nanoseconds: i64) -> String {
    let sign = if nanoseconds < 0 { "-" } else { "" };
    let total = nanoseconds.unsigned_abs();
    let (unit, scale) = match total {
        0 => return "0s".to_owned(),
        1..1_000 => ("ns", 1),
        1_000..1_000_000 => ("µs", 1_000),
        1_000_000..1_000_000_000 => ("ms", 1_000_000),
        _ => ("s", 1_000_000_000),
    };
    let fraction = |value: u64| {
        let digits = scale.to_string().len() - 1;
        match value % scale {
            0 => (value / scale).to_string(),
            rest => format!("{}.{}", value / scale, format!("{rest:0digits$}").trim_end_matches('0')),
        }
    };
    if unit != "s" {
        return format!("{sign}{}{unit}", fraction(total));
    }
    let (minutes, seconds) = (total / (60 * scale), fraction(total % (60 * scale)));
    match (minutes / 60, minutes % 60) {
        (0, 0) => format!("{sign}{seconds}s"),
        (0, minutes) => format!("{sign}{minutes}m{seconds}s"),
        (hours, minutes) => format!("{sign}{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn durations_as_go_has_them() {
        for (text, nanoseconds, printed) in [
            ("5s", 5_000_000_000, "5s"),
            ("0", 0, "0s"),
            ("1m30s", 90_000_000_000, "1m30s"),
            ("1h", 3_600_000_000_000, "1h0m0s"),
            ("1.5s", 1_500_000_000, "1.5s"),
            (".5ms", 500_000, "500µs"),
            ("1500us", 1_500_000, "1.5ms"),
            ("2ns", 2, "2ns"),
            ("-1s", -1_000_000_000, "-1s"),
        ] {
            assert_eq!(super::parse(text), Some(nanoseconds), "{text}");
            assert_eq!(super::format(nanoseconds), printed, "{text}");
        }
        for bad in ["", "5", "s", "1x", "1..2s", ".s", "99999999999999h", "1s1", "+"] {
            assert_eq!(super::parse(bad), None, "{bad}");
        }
    }
}
