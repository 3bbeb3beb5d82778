//! `forge inspect` and `forge history`: what an image says of itself.

use forge_snapshotter::image::{History as Line, ImageConfig, Platform};
use forge_snapshotter::{Store, StoredImage};
use serde_json::{Value, json};

use super::images::{age, table};
use super::ui::human_bytes;
use super::{Failure, Result, World, print};

#[derive(clap::Args)]
pub struct Inspect {
    /// Images: names, or ids
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
    /// The platform, where a name has several
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// `json`, or a field such as `.Config.Env` (also as `{{.Config.Env}}`)
    #[arg(short, long, value_name = "FORMAT", default_value = "json")]
    format: String,
}

#[derive(clap::Args)]
pub struct History {
    /// An image: a name, or an id
    #[arg(value_name = "IMAGE")]
    image: String,
    /// The platform, where a name has several
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<String>,
    /// Print every line in full
    #[arg(long)]
    no_trunc: bool,
    /// How to print it
    #[arg(long, value_name = "FORMAT", default_value = "table", value_parser = ["table", "json"])]
    format: String,
}

pub fn wanted_platform(platform: Option<&str>) -> Result<Platform> {
    platform.map_or(Ok(Platform::host()), |text| text.parse().map_err(Failure::usage))
}

pub fn inspect(arguments: &Inspect, world: &World) -> Result {
    let platform = wanted_platform(arguments.platform.as_deref())?;
    let mut all = Vec::new();
    for text in &arguments.images {
        let image = world.store.catalog().resolve(text, &platform)?.image;
        all.push(describe(&world.store, &image)?);
    }
    let format = arguments.format.trim();
    if format == "json" {
        let text = serde_json::to_string_pretty(&all).map_err(Failure::new)?;
        return print(text);
    }
    let path = format.strip_prefix("{{").and_then(|rest| rest.strip_suffix("}}")).unwrap_or(format).trim();
    let (path, as_json) = path.strip_prefix("json ").map_or((path, false), |rest| (rest.trim(), true));
    all.iter().try_for_each(|image| print(field(image, path, as_json)?))
}

/// docker's shape: what scripts already read.
fn describe(store: &Store, image: &StoredImage) -> Result<Value> {
    let catalog = store.catalog();
    let config = catalog.config(&image.id)?;
    let names: Vec<String> = catalog
        .tags()?
        .into_iter()
        .filter(|(_, tagged)| tagged.id == image.id)
        .map(|(name, _)| name.familiar())
        .collect();
    let mut size = 0;
    for diff_id in &config.rootfs.diff_ids {
        size += catalog.layer_size(diff_id)?.unwrap_or(0);
    }
    let ImageConfig { config: runtime, history: _, rootfs, created, author, architecture, os, variant, other: _ } =
        config;
    Ok(json!({
        "Id": image.id,
        "RepoTags": names,
        "Digest": image.manifest,
        "Created": created,
        "Author": author.unwrap_or_default(),
        "Config": runtime,
        "Architecture": architecture,
        "Variant": variant,
        "Os": os,
        "Size": size,
        "RootFS": { "Type": rootfs.kind, "Layers": rootfs.diff_ids },
    }))
}

/// `.Config.Env` of a value; strings come bare, everything else as JSON.
fn field(value: &Value, path: &str, as_json: bool) -> Result<String> {
    let mut current = value;
    for name in path.split('.').filter(|name| !name.is_empty()) {
        let next = match name.parse::<usize>() {
            Ok(index) if current.is_array() => current.get(index),
            _ => current.get(name),
        };
        current = match (next, current.as_object()) {
            (Some(next), _) => next,
            // A field of a configuration that is not set is empty, not unknown.
            (None, Some(_)) if path.starts_with(".Config.") => &Value::Null,
            (None, object) => {
                let known: Vec<&str> =
                    object.map(|object| object.keys().map(String::as_str).collect()).unwrap_or_default();
                return Err(Failure::usage(format!("--format: no field {name:?}"))
                    .hint(format!("there are: {}", known.join(", "))));
            }
        };
    }
    Ok(match current {
        Value::String(text) if !as_json => text.clone(),
        other => other.to_string(),
    })
}

pub fn history(arguments: &History, world: &World) -> Result {
    let platform = wanted_platform(arguments.platform.as_deref())?;
    let catalog = world.store.catalog();
    let image = catalog.resolve(&arguments.image, &platform)?.image;
    let config = catalog.config(&image.id)?;
    let mut layers = config.rootfs.diff_ids.iter();
    let mut rows = Vec::new();
    for line in &config.history {
        let diff_id = if line.empty_layer { None } else { layers.next() };
        let size = diff_id.map(|diff_id| catalog.layer_size(diff_id)).transpose()?.flatten().unwrap_or(0);
        rows.push((line, size));
    }
    rows.reverse();
    if arguments.format == "json" {
        return rows.iter().try_for_each(|(line, size)| print(history_json(line, *size)));
    }
    let cells = rows.iter().map(|(line, size)| {
        let created_by = line.created_by.as_deref().unwrap_or_default();
        let created_by = if arguments.no_trunc {
            created_by.to_owned()
        } else {
            console::truncate_str(created_by, 60, "…").into_owned()
        };
        vec![
            line.created.as_deref().map_or_else(|| "N/A".to_owned(), age),
            created_by,
            human_bytes(*size),
            line.comment.clone().unwrap_or_default(),
        ]
    });
    table(&["CREATED", "CREATED BY", "SIZE", "COMMENT"], cells.collect())
}

fn history_json(line: &Line, size: u64) -> Value {
    json!({
        "CreatedAt": line.created,
        "CreatedBy": line.created_by,
        "Comment": line.comment,
        "Size": size,
        "EmptyLayer": line.empty_layer,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_path() {
        let value = json!({ "Config": { "Env": ["A=1"], "User": "me" }, "Size": 3 });
        for (path, expect) in [
            (".Config.User", "me"),
            (".Config.Env", r#"["A=1"]"#),
            (".Config.Env.0", "A=1"),
            (".Size", "3"),
            (".Config.Cmd", "null"),
        ] {
            assert_eq!(field(&value, path, false).expect(path), expect);
        }
        assert_eq!(field(&value, ".Config.User", true).expect("json"), "\"me\"");
        assert!(field(&value, ".Nothing", false).is_err());
    }
}
