//! Real base images, made from packages where the maker is at hand, served by a real registry.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use super::registry::Registry;
use super::{have, skip};

/// The OCI layout of a base image, made if need be; `None` (and said) where it cannot be had.
pub fn layout(name: &str) -> Option<PathBuf> {
    let maker = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/base-images/make-base-images");
    let maker = std::env::var_os("FORGE_BASE_IMAGES").map_or(maker, PathBuf::from);
    if !maker.exists() {
        skip("no base images here: FORGE_BASE_IMAGES names their maker");
        return None;
    }
    // One at a time: the maker itself waits, but says so a hundred times.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let output = Command::new(&maker).arg(name).output().expect("the maker of base images starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    let directory = text.lines().last().and_then(|line| line.split('\t').nth(2)).expect("a layout directory");
    Some(PathBuf::from(directory))
}

/// A registry that serves base images, shared by the tests of one run.
pub fn registry() -> Option<&'static Registry> {
    static REGISTRY: OnceLock<Option<Registry>> = OnceLock::new();
    REGISTRY.get_or_init(Registry::start).as_ref()
}

/// Puts a base image into the shared registry, under the name that Dockerfiles use; `None` where it cannot be had.
pub fn serve(name: &str, reference: &str) -> Option<String> {
    let registry = registry()?;
    let layout = layout(name)?;
    if !have("skopeo") {
        return None;
    }
    static SERVED: Mutex<Vec<String>> = Mutex::new(Vec::new());
    let mut served = SERVED.lock().unwrap_or_else(PoisonError::into_inner);
    let target = format!("{}/{reference}", registry.address());
    if !served.contains(&target) {
        let output = Command::new("skopeo")
            .args(["copy", "--quiet", "--all", "--dest-tls-verify=false"])
            .arg(format!("oci:{}", layout.display()))
            .arg(format!("docker://{target}"))
            .output()
            .expect("skopeo starts");
        assert!(output.status.success(), "{target}: {}", String::from_utf8_lossy(&output.stderr));
        served.push(target.clone());
    }
    Some(target)
}
