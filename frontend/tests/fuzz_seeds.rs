//! The fuzz targets' promises, held to their seeds and to what fuzzing has found.

#[path = "../../tests/fuzz/targets.rs"]
mod targets;

fn seeds(target: &str, run: fn(&str)) {
    let directory = format!("{}/../tests/fuzz/seeds/{target}", env!("CARGO_MANIFEST_DIR"));
    let mut files = 0;
    for file in std::fs::read_dir(directory).expect("the seeds are part of the repository") {
        let text = std::fs::read_to_string(file.expect("an entry").path()).expect("a seed is text");
        run(&text);
        files += 1;
    }
    assert!(files >= 4, "{target}: {files} seeds");
}

#[test]
fn seeds_of_parse() {
    seeds("parse", targets::parse);
}

#[test]
fn seeds_of_expand() {
    seeds("expand", targets::expand);
}

#[test]
fn seeds_of_ignore() {
    seeds("ignore", targets::ignore);
}

#[test]
fn seeds_of_plan() {
    seeds("plan", targets::plan);
}
