//! The shape of the repository: what stands at its top, and which way the arrows between crates point.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn cargo_metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo starts");
    serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
}

/// Which of our crates each of our crates names, tests included.
fn arrows() -> BTreeMap<String, Vec<String>> {
    let metadata = cargo_metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    let name = |value: &Value| value["name"].as_str().expect("a name").to_owned();
    let ours: Vec<String> = packages.iter().map(&name).collect();
    let dependencies = |package: &Value| {
        let all = package["dependencies"].as_array().expect("dependencies");
        let mut named: Vec<String> = all.iter().map(&name).filter(|dependency| ours.contains(dependency)).collect();
        named.sort();
        named.dedup();
        named
    };
    packages.iter().map(|package| (name(package), dependencies(package))).collect()
}

#[test]
fn arrows_between_crates_point_one_way() {
    let expect: BTreeMap<String, Vec<String>> = [
        ("forge", vec!["forge-exporter", "forge-frontend", "forge-snapshotter", "forge-solver"]),
        ("forge-exporter", vec!["forge-snapshotter"]),
        ("forge-frontend", vec!["forge-solver"]),
        ("forge-snapshotter", vec![]),
        ("forge-solver", vec!["forge-snapshotter"]),
    ]
    .into_iter()
    .map(|(name, to)| (name.to_owned(), to.into_iter().map(str::to_owned).collect()))
    .collect();
    assert_eq!(arrows(), expect);
}

#[test]
fn nothing_else_stands_at_the_top_level() {
    let expect = [
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "README.md",
        "exporter",
        "frontend",
        "runner",
        "snapshotter",
        "solver",
        "target",
        "tests",
    ];
    let top = std::fs::read_dir(env!("CARGO_MANIFEST_DIR")).expect("the repository");
    for entry in top {
        let name = entry.expect("an entry").file_name().into_string().expect("a plain name");
        assert!(name.starts_with('.') || expect.contains(&name.as_str()), "{name} is not in the design");
    }
}

#[test]
fn unsafe_code_lives_in_the_runner_alone() {
    fn visit(directory: &Path, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(directory).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                visit(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source file");
                if text.contains("unsafe {") || text.contains("unsafe fn") || text.contains("allow(unsafe_code") {
                    found.push(path.display().to_string());
                }
            }
        }
    }
    let mut found = Vec::new();
    for name in ["frontend", "solver", "snapshotter", "exporter"] {
        visit(&Path::new(env!("CARGO_MANIFEST_DIR")).join(name), &mut found);
    }
    assert!(found.is_empty(), "{found:?}");
}
