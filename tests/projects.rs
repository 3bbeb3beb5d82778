//! Real projects on real bases, with dependencies from the real package registries: built, run, rebuilt, edited, rebuilt.

use std::fs;
use std::path::Path;

use crate::support::{TestEnv, bases};

struct Project {
    name: &'static str,
    /// Base images, and the names that the Dockerfile knows them by.
    bases: &'static [(&'static str, &'static str)],
    run: &'static [&'static str],
    expect: &'static str,
    /// A one-line edit, and what the program says afterwards.
    edit: (&'static str, &'static str, &'static str),
    after: &'static str,
    /// A step that the edit must not run again.
    kept: &'static str,
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a directory");
    for entry in fs::read_dir(from).expect("a directory") {
        let (entry, target) = entry.map(|entry| (entry.path(), to.join(entry.file_name()))).expect("an entry");
        match entry.is_dir() {
            true => copy(&entry, &target),
            false => drop(fs::copy(&entry, &target).expect("copied")),
        }
    }
}

fn check(project: &Project) {
    let env = TestEnv::new();
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/projects").join(project.name), &env.work());
    let mut registry = String::new();
    for (name, reference) in project.bases {
        let Some(served) = bases::serve(name, reference) else { return };
        registry = served.split('/').next().expect("a host").to_owned();
    }
    let registry = format!("REGISTRY={registry}");
    let arguments = ["build", "--progress=plain", "--build-arg", &registry, "-t", "app", "."];
    let run = || env.forge(&[&["run", "--rm", "app"], project.run].concat()).ok();
    let first = env.forge(&arguments).ok();
    assert!(run().stdout.contains(project.expect), "{}: {}", project.name, run().stdout);
    let warm = env.forge(&arguments).ok().silent_about("miss:");
    assert_eq!(first.last_line(), warm.last_line(), "{}", project.name);
    let (file, old, new) = project.edit;
    let text = fs::read_to_string(env.work().join(file)).expect(file);
    assert!(text.contains(old), "{file} has no {old:?}");
    env.file(file, text.replace(old, new));
    let edited = env.forge(&arguments).ok().says("miss:");
    assert!(run().stdout.contains(project.after), "{}: {}", project.name, run().stdout);
    let line = edited
        .stderr
        .lines()
        .find(|line| line.contains(project.kept))
        .unwrap_or_else(|| panic!("{}: {}", project.kept, edited.stderr));
    let number = line.split(' ').next().expect("a number");
    assert!(edited.stderr.contains(&format!("{number} CACHED")), "{} ran again: {}", project.kept, edited.stderr);
}

#[test]
fn flask_service_with_requirements() {
    check(&Project {
        name: "flask",
        bases: &[("python", "python:3-slim")],
        run: &["python3", "app.py", "--check"],
        expect: "hello from flask",
        edit: ("app.py", "hello from flask", "good day from flask"),
        after: "good day from flask",
        kept: "RUN --mount=type=cache",
    });
}

#[test]
fn express_service_with_a_lock_file() {
    check(&Project {
        name: "express",
        bases: &[("node", "node:22-slim")],
        run: &["--check"],
        expect: "hello from express",
        edit: ("server.js", "hello from express", "good day from express"),
        after: "good day from express",
        kept: "RUN --mount=type=cache",
    });
}

#[test]
fn go_program_in_two_stages_to_scratch() {
    check(&Project {
        name: "go",
        bases: &[("golang", "golang:1")],
        run: &["tests"],
        expect: "hello tests from go dev as 65532",
        edit: ("cmd/main.go", "hello %s", "good day %s"),
        after: "good day tests",
        kept: "COPY go.mod",
    });
}

#[test]
fn rust_program_with_cache_mounts_for_cargo() {
    check(&Project {
        name: "rust",
        bases: &[("debian", "debian:bookworm-slim"), ("rust", "rust:1")],
        run: &[],
        expect: "hello from rust 42",
        edit: ("src/main.rs", "hello from rust", "good day from rust"),
        after: "good day from rust 42",
        kept: "WORKDIR /src",
    });
}

#[test]
fn c_project_with_make() {
    check(&Project {
        name: "c",
        bases: &[("buildpack", "buildpack-deps:bookworm")],
        run: &[],
        expect: "hello from c, made with make",
        edit: ("greet.c", "hello from c", "good day from c"),
        after: "good day from c, made with make",
        kept: "WORKDIR /src",
    });
}

#[test]
fn apt_installs_packages_over_the_default_network() {
    let Some(debian) = bases::serve("debian", "debian:bookworm-slim") else { return };
    let env = TestEnv::new();
    env.dockerfile(&format!("FROM {debian}\nRUN apt-get update && apt-get install -y --no-install-recommends hello && rm -rf /var/lib/apt/lists/*\nCMD [\"hello\"]\n"));
    env.forge(&["build", "--progress=plain", "-t", "app", "."]).ok();
    env.forge(&["run", "--rm", "app"]).ok().prints("Hello, world!");
}
