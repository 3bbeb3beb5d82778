//! The local store as commands show it: names, ids, sizes, archives.

use crate::support::{SHELL, TestEnv, have};

fn env() -> TestEnv {
    let env = TestEnv::new();
    env.dockerfile(&format!("{SHELL}RUN echo x > /x\nCMD [\"cat\", \"/x\"]\n"));
    env.build(&["-t", "app:v1"]).ok();
    env
}

#[test]
fn images_are_listed_tagged_and_removed() {
    let env = env();
    env.forge(&["tag", "app:v1", "registry.example.com/team/app:v2"]).ok();
    let listed = env.forge(&["images"]).ok().prints("app ").prints("registry.example.com/team/app");
    assert_eq!(listed.stdout.lines().count(), 3);
    let json = env.forge(&["images", "--format=json", "app"]).ok();
    let row: serde_json::Value = serde_json::from_str(json.last_line()).expect("json");
    assert_eq!((&row["Repository"], &row["Tag"]), (&"app".into(), &"v1".into()));
    let id = row["ID"].as_str().expect("an id").to_owned();
    assert!(env.forge(&["images", "-q", "--no-trunc"]).ok().stdout.contains(&id));
    // By a part of its id, too.
    env.forge(&["inspect", "-f", ".Id", &id[7..15]]).ok().prints(&id);
    env.forge(&["rmi", "app:v1"]).ok().says("Untagged");
    env.forge(&["run", "--rm", "registry.example.com/team/app:v2"]).ok().prints("x");
    env.forge(&["rmi", "registry.example.com/team/app:v2"]).ok().prints(&format!("Deleted: {id}"));
    env.forge(&["inspect", &id]).fails(1);
}

#[test]
fn archives_carry_an_image_to_another_store() {
    for format in ["docker-archive", "oci-archive", "oci-dir"] {
        let (from, to) = (env(), TestEnv::new());
        let id = from.forge(&["inspect", "-f", ".Id", "app:v1"]).ok().stdout;
        let path = from.work().join("saved");
        let path = path.to_str().expect("a plain path");
        from.forge(&["save", "--format", format, "-o", path, "app:v1"]).ok();
        to.forge(&["load", "-i", path]).ok().prints("app:v1");
        assert_eq!(to.forge(&["inspect", "-f", ".Id", "app:v1"]).ok().stdout, id, "{format}");
        assert_eq!(to.forge(&["run", "--rm", "app:v1"]).ok().stdout, "x\n", "{format}");
    }
}

#[test]
fn other_tools_read_what_is_saved_and_forge_reads_theirs() {
    if !have("skopeo") || !have("umoci") {
        return;
    }
    let env = env();
    env.forge(&["save", "-o", "docker.tar", "app:v1"]).ok();
    let tool = |program: &str, arguments: &[&str]| {
        let mut command = std::process::Command::new(program);
        command.args(arguments).current_dir(env.work());
        crate::support::Finished::of(command).ok()
    };
    tool("skopeo", &["copy", "-q", "docker-archive:docker.tar", "oci:theirs:latest"]);
    tool("umoci", &["unpack", "--image", "theirs:latest", "bundle"]);
    assert_eq!(std::fs::read_to_string(env.work().join("bundle/rootfs/x")).expect("x"), "x\n");
    tool("skopeo", &["copy", "-q", "oci:theirs:latest", "oci-archive:theirs.tar:theirs"]);
    let other = TestEnv::new();
    other.forge(&["load", "-i", env.work().join("theirs.tar").to_str().expect("plain")]).ok();
    let id = other.forge(&["images", "-aq"]).ok().stdout;
    other.forge(&["run", "--rm", id.trim()]).ok().prints("x");
    // A layout is a base as well.
    env.file("Dockerfile", "FROM base\nRUN cat /x > /y\n");
    env.forge(&["build", "-t", "child", "--build-context", "base=oci-layout://theirs:latest", "."]).ok();
    env.forge(&["run", "--rm", "child", "cat", "/y"]).ok().prints("x");
}

#[test]
fn prune_frees_what_nothing_names_and_du_adds_up() {
    let env = env();
    env.dockerfile(&format!("{SHELL}RUN dd if=/dev/zero of=/big bs=1M count=20\n"));
    env.build(&["-t", "big"]).ok();
    let bytes = |env: &TestEnv| -> u64 {
        let kinds = env.forge(&["du", "--format=json"]).ok().json();
        kinds.as_array().expect("kinds").iter().map(|kind| kind["Bytes"].as_u64().expect("bytes")).sum()
    };
    let before = bytes(&env);
    assert!(before > 20 << 20, "{before}");
    env.forge(&["rmi", "big"]).ok();
    env.forge(&["prune", "--all", "--force"]).ok().prints("reclaimed");
    let after = bytes(&env);
    assert!(after <= before - (20 << 20), "{before} -> {after}");
    env.forge(&["run", "--rm", "app:v1"]).ok().prints("x");
}

#[test]
fn history_tells_how_an_image_was_made() {
    let env = env();
    let history = env.forge(&["history", "--no-trunc", "app:v1"]).ok().prints("RUN /bin/sh -c echo x > /x # buildkit");
    let lines: Vec<&str> = history.stdout.lines().collect();
    assert!(lines[1].contains("CMD [\"cat\" \"/x\"]"), "{}", history.stdout);
}

#[test]
fn version_is_told_without_any_state() {
    let env = TestEnv::new();
    env.forge(&["version"]).ok().prints("forge ");
    let json = env.forge(&["version", "--format=json"]).ok().json();
    assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
    assert!(!env.root().exists());
}
