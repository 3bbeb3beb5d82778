//! Layers as others made them, where there are any: every layer of the OCI layouts in FORGE_TEST_LAYOUTS (a
//! directory of layouts) comes through apply and diff as it was.

use std::path::PathBuf;
use std::time::Instant;

use super::*;

/// The manifest's layers and the configuration's diff ids, by pairs.
fn layers(layout: &Path) -> Option<Vec<(PathBuf, Digest)>> {
    let blob = |digest: &str| layout.join("blobs").join(digest.replacen(':', "/", 1));
    let json = |path: PathBuf| serde_json::from_slice::<serde_json::Value>(&std::fs::read(path).ok()?).ok();
    let mut value = json(layout.join("index.json"))?;
    while let Some(manifest) = value["manifests"].get(0) {
        value = json(blob(manifest["digest"].as_str()?))?;
    }
    let config = json(blob(value["config"]["digest"].as_str()?))?;
    let ids = config["rootfs"]["diff_ids"].as_array()?.iter().map(|id| id.as_str()?.parse().ok());
    let blobs = value["layers"].as_array()?.iter().map(|layer| Some(blob(layer["digest"].as_str()?)));
    blobs.zip(ids).map(|(blob, id)| Some((blob?, id?))).collect()
}

#[test]
fn layers_of_other_builders_come_through() {
    let Some(layouts) = std::env::var_os("FORGE_TEST_LAYOUTS").map(PathBuf::from) else {
        return writeln_stderr("skipped: FORGE_TEST_LAYOUTS names no directory of OCI layouts");
    };
    if !privileged() {
        return;
    }
    for layout in std::fs::read_dir(layouts).unwrap() {
        let layout = layout.unwrap().path();
        for (blob, diff_id) in layers(&layout).unwrap_or_default() {
            come_through(&layout, &blob, &diff_id);
        }
    }
}

fn come_through(layout: &Path, blob: &Path, diff_id: &Digest) {
    let (x, y) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let start = Instant::now();
    let summary = unpack(std::fs::File::open(blob).unwrap(), diff_id, x.path(), &APPLY).unwrap();
    let unpacked = start.elapsed();
    let mut lines = format!("{} {}: {summary:?}", layout.display(), diff_id.short());
    let speed = |bytes: u64, time: std::time::Duration| bytes as f64 / 1e6 / time.as_secs_f64();
    lines += &format!("\n  unpack {:.0} MB/s", speed(summary.bytes, unpacked));
    for compression in [Compression::None, Compression::GZIP, Compression::ZSTD] {
        let start = Instant::now();
        let packed = pack(x.path(), &DIFF, compression, std::io::sink()).unwrap();
        let bytes = packed.uncompressed_bytes;
        lines +=
            &format!(", {compression} {:.0} MB/s ({} of {bytes})", speed(bytes, start.elapsed()), packed.size_bytes);
    }
    let start = Instant::now();
    content_digest(x.path(), Driver::Overlay).unwrap();
    lines += &format!(", content digest {:.0} MB/s", speed(summary.bytes, start.elapsed()));
    writeln_stderr(&lines);
    apply(&mut &tar_of(x.path())[..], y.path(), &APPLY).unwrap();
    assert!(dump(x.path()) == dump(y.path()), "{} {diff_id}", layout.display());
}
