//! Against a real registry: bases from it, results to it, credentials for it.

use crate::support::registry::Registry;
use crate::support::{SHELL, TestEnv, have};

fn built() -> TestEnv {
    let env = TestEnv::new();
    env.dockerfile(&format!("{SHELL}RUN echo pushed > /x\nCMD [\"cat\", \"/x\"]\n"));
    env.build(&["-t", "app"]).ok();
    env
}

#[test]
fn an_image_goes_to_a_registry_and_comes_back() {
    let Some(registry) = Registry::start() else { return };
    let (env, name) = (built(), format!("{}/team/app:v1", registry.address()));
    env.forge(&["tag", "app", &name]).ok();
    let pushed = env.forge(&["push", &name]).ok();
    assert!(pushed.last_line().contains("sha256:"), "{}", pushed.stdout);
    let id = env.forge(&["inspect", "-f", ".Id", "app"]).ok().stdout;
    let other = TestEnv::new();
    other.forge(&["pull", &name]).ok();
    assert_eq!(other.forge(&["inspect", "-f", ".Id", &name]).ok().stdout, id);
    assert_eq!(other.forge(&["run", "--rm", &name]).ok().stdout, "pushed\n");
    // Not there: said as such.
    other.forge(&["pull", &format!("{}/team/nothing", registry.address())]).fails(1).says("team/nothing");
    // `run` pulls what is missing.
    let third = TestEnv::new();
    assert_eq!(third.forge(&["run", "--rm", &name]).ok().stdout, "pushed\n");
}

#[test]
fn a_base_is_fetched_only_when_a_step_needs_it() {
    let Some(registry) = Registry::start() else { return };
    let (env, base) = (built(), format!("{}/base:v1", registry.address()));
    env.forge(&["tag", "app", &base]).ok();
    env.forge(&["push", &base]).ok();
    let user = TestEnv::new();
    // Configuration alone: no layer is downloaded, not even for the push to where the base came from.
    user.dockerfile(&format!("FROM {base}\nLABEL only=config\n"));
    let child = format!("{}/child:v1", registry.address());
    user.forge(&["build", "--progress=plain", "-t", &child, "--push", "."]).ok();
    let blobs = user.root().join("blobs/sha256");
    let largest =
        std::fs::read_dir(&blobs).expect("blobs").flatten().map(|e| e.metadata().expect("metadata").len()).max();
    assert!(largest.is_some_and(|size| size < 100_000), "a layer was downloaded: {largest:?}");
    let other = TestEnv::new();
    assert_eq!(other.forge(&["run", "--rm", &child]).ok().stdout, "pushed\n");
    // A step needs the files.
    user.dockerfile(&format!("FROM {base}\nRUN cat /x > /y\n"));
    user.forge(&["build", "--progress=plain", "-t", "local", "."]).ok();
    assert_eq!(user.forge(&["run", "--rm", "local", "cat", "/y"]).ok().stdout, "pushed\n");
}

#[test]
fn credentials_come_from_dockers_configuration() {
    // htpasswd of user `forge`, password `secret` (bcrypt).
    let directory = tempfile::tempdir().expect("a directory");
    let htpasswd = directory.path().join("htpasswd");
    if !have("htpasswd") {
        return;
    }
    let made =
        std::process::Command::new("htpasswd").args(["-Bbn", "forge", "secret"]).output().expect("htpasswd starts");
    std::fs::write(&htpasswd, made.stdout).expect("written");
    let auth = format!("auth:\n  htpasswd:\n    realm: test\n    path: {}", htpasswd.display());
    let Some(registry) = Registry::start_with(&auth) else { return };
    let (env, name) = (built(), format!("{}/app", registry.address()));
    env.forge(&["tag", "app", &name]).ok();
    env.forge(&["push", &name]).fails(1).says("auth");
    env.file(
        "docker/config.json",
        format!("{{\"auths\":{{\"{}\":{{\"auth\":\"Zm9yZ2U6c2VjcmV0\"}}}}}}", registry.address()),
    );
    let mut command = env.command(&["push", &name]);
    command.env("DOCKER_CONFIG", env.work().join("docker"));
    let pushed = crate::support::Finished::of(command).ok();
    assert!(!pushed.stderr.contains("secret") && !pushed.stderr.contains("Zm9yZ2U6c2VjcmV0"), "{}", pushed.stderr);
}

#[test]
fn other_tools_read_what_was_pushed() {
    let Some(registry) = Registry::start() else { return };
    if !have("skopeo") {
        return;
    }
    let env = built();
    for (compression, media_type) in [("gzip", "tar+gzip"), ("zstd", "tar+zstd"), ("uncompressed", "layer.v1.tar\"")] {
        let name = format!("{}/app:{compression}", registry.address());
        let output = format!("type=registry,name={name},compression={compression},force-compression=true");
        env.build(&["-o", &output]).ok();
        let manifest =
            registry.get(&format!("/v2/app/manifests/{compression}"), "application/vnd.oci.image.manifest.v1+json");
        assert!(manifest.contains(media_type), "{manifest}");
        let mut command = std::process::Command::new("skopeo");
        command
            .args([
                "copy",
                "-q",
                "--src-tls-verify=false",
                &format!("docker://{name}"),
                &format!("oci:copied:{compression}"),
            ])
            .current_dir(env.work());
        crate::support::Finished::of(command).ok();
    }
}
