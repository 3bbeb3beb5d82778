//! Who sees which variable.
//!
//! ```text
//! platform ARGs ─> global ARGs ─> FROM lines
//!                       │
//!                       └─(re-declared)─> stage ─> stages built on it
//! ```

use std::collections::BTreeMap;

use forge_solver::graph::image::Platform;

use crate::diagnostic::Diagnostic;
use crate::expand::Expander;
use crate::instruction::{Dockerfile, Kind};

/// Names and values in order, each name once.
pub type Variables = Vec<(String, String)>;

/// Sets a value; a name that is set again goes to the end, as BuildKit has it.
pub fn set(variables: &mut Variables, name: &str, value: &str) {
    variables.retain(|(key, _)| key != name);
    variables.push((name.to_owned(), value.to_owned()));
}

/// `BUILD*` and `TARGET*`, which `FROM` lines see without a declaration.
pub fn platform_arguments(
    build: &Platform,
    target: &Platform,
    stage: &str,
    overrides: &BTreeMap<String, String>,
) -> Variables {
    let variant = |platform: &Platform| platform.variant.clone().unwrap_or_default();
    let stage = if stage.is_empty() { "default" } else { stage };
    let defaults = [
        ("BUILDPLATFORM", build.to_string()),
        ("BUILDOS", build.os.clone()),
        ("BUILDOSVERSION", String::new()),
        ("BUILDARCH", build.architecture.clone()),
        ("BUILDVARIANT", variant(build)),
        ("TARGETPLATFORM", target.to_string()),
        ("TARGETOS", target.os.clone()),
        ("TARGETOSVERSION", String::new()),
        ("TARGETARCH", target.architecture.clone()),
        ("TARGETVARIANT", variant(target)),
        ("TARGETSTAGE", stage.to_owned()),
    ];
    let value = |(name, default): (&str, String)| (name.to_owned(), overrides.get(name).cloned().unwrap_or(default));
    defaults.into_iter().map(value).collect()
}

/// The global scope after the `ARG`s before the first `FROM`.
pub fn globals(
    file: &Dockerfile,
    mut scope: Variables,
    build_args: &BTreeMap<String, String>,
) -> Result<Variables, Diagnostic> {
    let expander = Expander::new(file.directives.escape);
    for instruction in &file.globals {
        let Kind::Arg(arguments) = &instruction.kind else { continue };
        for argument in arguments {
            let value = match (build_args.get(&argument.key.text), &argument.value) {
                (Some(given), _) => Some(given.clone()),
                (None, Some(default)) => {
                    let expanded = expander.expand(&default.text, scope.as_slice());
                    Some(expanded.map_err(|e| Diagnostic::error(default.span, e.to_string()))?.text)
                }
                (None, None) => None,
            };
            if let Some(value) = value {
                set(&mut scope, &argument.key.text, &value);
            }
        }
    }
    Ok(scope)
}

/// The date that a global `ARG SOURCE_DATE_EPOCH` gives.
pub fn epoch(file: &Dockerfile, globals: &Variables) -> Result<Option<i64>, Diagnostic> {
    const NAME: &str = "SOURCE_DATE_EPOCH";
    let Some((_, value)) = globals.iter().find(|(name, value)| name == NAME && !value.is_empty()) else {
        return Ok(None);
    };
    let declares = |kind: &Kind| matches!(kind, Kind::Arg(arguments) if arguments.iter().any(|a| a.key.text == NAME));
    let span = file.globals.iter().rev().find(|instruction| declares(&instruction.kind)).map(|found| found.code.span);
    value.parse().map(Some).map_err(|_| {
        Diagnostic::error(span.unwrap_or_default(), format!("invalid {NAME}: {value}"))
            .hint("it is a number of seconds since 1970; no date is taken from contexts or stages")
    })
}

/// The global scope of a build without any `--build-arg`.
pub fn default_globals(file: &Dockerfile) -> Option<Variables> {
    let host = Platform::host();
    globals(file, platform_arguments(&host, &host, "", &BTreeMap::new()), &BTreeMap::new()).ok()
}
