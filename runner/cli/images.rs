//! `forge images`, `forge tag`, `forge rmi`: the names in the local store.

use std::collections::BTreeMap;

use forge_snapshotter::image::{Platform, Reference};
use forge_snapshotter::{Digest, Store, StoredImage};
use serde_json::json;

use super::ui::human_bytes;
use super::{Failure, Result, World, print, say};

#[derive(clap::Args)]
pub struct List {
    /// Only images of this name
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Also images without a name
    #[arg(short, long)]
    all: bool,
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
    /// Print digests and ids in full
    #[arg(long)]
    no_trunc: bool,
    /// How to print it
    #[arg(long, value_name = "FORMAT", default_value = "table", value_parser = ["table", "json"])]
    format: String,
}

#[derive(clap::Args)]
pub struct Tag {
    /// An image: a name, or an id
    #[arg(value_name = "IMAGE")]
    source: String,
    /// Its new name
    #[arg(value_name = "NAME")]
    target: String,
}

#[derive(clap::Args)]
pub struct Remove {
    /// Images: names, or ids
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
    /// Remove an image with all its names, and be content where there is none
    #[arg(short, long)]
    force: bool,
}

/// A line of `forge images`.
struct Row {
    name: Option<Reference>,
    image: StoredImage,
    size_bytes: u64,
}

pub fn list(arguments: &List, world: &World) -> Result {
    let rows = rows(arguments, &world.store)?;
    if arguments.quiet {
        let mut ids: Vec<&Digest> = rows.iter().map(|row| &row.image.id).collect();
        ids.dedup();
        return ids.into_iter().try_for_each(|id| print(shown_id(id, arguments.no_trunc)));
    }
    if arguments.format == "json" {
        return rows.iter().try_for_each(|row| print(row.json()));
    }
    let cells = rows.iter().map(|row| row.cells(arguments.no_trunc)).collect();
    table(&["REPOSITORY", "TAG", "IMAGE ID", "PLATFORM", "CREATED", "SIZE"], cells)
}

fn rows(arguments: &List, store: &Store) -> Result<Vec<Row>> {
    let catalog = store.catalog();
    let wanted: Option<Reference> = arguments.name.as_deref().map(str::parse).transpose().map_err(Failure::usage)?;
    let mut sizes = BTreeMap::new();
    let mut rows = Vec::new();
    let mut named = std::collections::BTreeSet::new();
    for (name, image) in catalog.tags()? {
        named.insert(image.id.clone());
        if wanted.as_ref().is_none_or(|wanted| matches(wanted, &name, arguments.name.as_deref().unwrap_or_default())) {
            rows.push(Row { name: Some(name), size_bytes: size(store, &image, &mut sizes)?, image });
        }
    }
    if arguments.all && wanted.is_none() {
        for image in catalog.images()?.into_iter().filter(|image| !named.contains(&image.id)) {
            rows.push(Row { name: None, size_bytes: size(store, &image, &mut sizes)?, image });
        }
    }
    rows.sort_by(|a, b| b.image.created.cmp(&a.image.created).then_with(|| a.name.cmp(&b.name)));
    Ok(rows)
}

/// A name without a tag means every tag of its repository.
fn matches(wanted: &Reference, name: &Reference, text: &str) -> bool {
    let same_repository = (wanted.registry(), wanted.repository()) == (name.registry(), name.repository());
    let has_tag = text.rsplit('/').next().is_some_and(|last| last.contains(':'));
    same_repository && (!has_tag || wanted.tag() == name.tag())
}

/// What the image's files take, each shared layer counted once per image as docker does.
fn size(store: &Store, image: &StoredImage, known: &mut BTreeMap<Digest, u64>) -> Result<u64> {
    if let Some(size) = known.get(&image.id) {
        return Ok(*size);
    }
    let catalog = store.catalog();
    let config = catalog.config(&image.id)?;
    let mut total = 0;
    for diff_id in &config.rootfs.diff_ids {
        total += catalog.layer_size(diff_id)?.unwrap_or(0);
    }
    known.insert(image.id.clone(), total);
    Ok(total)
}

impl Row {
    fn cells(&self, full: bool) -> Vec<String> {
        let none = || "<none>".to_owned();
        let familiar = self.name.as_ref().map(Reference::familiar);
        let repository = familiar.as_deref().map(|name| split_tag(name).0.to_owned());
        vec![
            repository.unwrap_or_else(none),
            self.name.as_ref().and_then(Reference::tag).map_or_else(none, str::to_owned),
            shown_id(&self.image.id, full),
            self.image.platform.to_string(),
            self.image.created.as_deref().map_or_else(|| "N/A".to_owned(), age),
            human_bytes(self.size_bytes),
        ]
    }

    fn json(&self) -> serde_json::Value {
        let familiar = self.name.as_ref().map(Reference::familiar);
        json!({
            "Repository": familiar.as_deref().map_or("<none>", |name| split_tag(name).0),
            "Tag": self.name.as_ref().and_then(Reference::tag).unwrap_or("<none>"),
            "ID": self.image.id,
            "Digest": self.image.manifest,
            "Platform": self.image.platform.to_string(),
            "CreatedAt": self.image.created,
            "Size": human_bytes(self.size_bytes),
            "SizeBytes": self.size_bytes,
        })
    }
}

fn split_tag(name: &str) -> (&str, &str) {
    let name = name.split('@').next().unwrap_or(name);
    let slash = name.rfind('/').map_or(0, |slash| slash + 1);
    name[slash..].find(':').map_or((name, ""), |colon| (&name[..slash + colon], &name[slash + colon + 1..]))
}

fn shown_id(id: &Digest, full: bool) -> String {
    if full { id.to_string() } else { id.short().to_owned() }
}

/// `3 hours ago`, as docker says it.
pub fn age(created: &str) -> String {
    let Ok(created) = created.parse::<jiff::Timestamp>() else { return created.to_owned() };
    let seconds = jiff::Timestamp::now().as_second().saturating_sub(created.as_second()).max(0);
    let (number, unit) = match seconds {
        0..60 => return "Less than a minute ago".to_owned(),
        60..3_600 => (seconds / 60, "minute"),
        3_600..172_800 => (seconds / 3_600, "hour"),
        172_800..1_209_600 => (seconds / 86_400, "day"),
        1_209_600..5_184_000 => (seconds / 604_800, "week"),
        5_184_000..63_072_000 => (seconds / 2_592_000, "month"),
        _ => (seconds / 31_536_000, "year"),
    };
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {unit}{plural} ago")
}

/// Columns as wide as they need to be, three spaces apart.
pub fn table(head: &[&str], rows: Vec<Vec<String>>) -> Result {
    let width = |column: usize| {
        rows.iter().map(|row| console::measure_text_width(&row[column])).chain([head[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("   ").trim_end().to_owned()
    };
    print(line(head.to_vec()))?;
    rows.iter().try_for_each(|row| print(line(row.iter().map(String::as_str).collect())))
}

pub fn tag(arguments: &Tag, world: &World) -> Result {
    let target: Reference = arguments.target.parse().map_err(Failure::usage)?;
    if target.digest().is_some() {
        return Err(Failure::usage(format!("{target}: a digest cannot be given as a name")));
    }
    let catalog = world.store.catalog();
    let images = match arguments.source.parse::<Reference>() {
        // All platforms of a name go along.
        Ok(source) if !catalog.tagged(&source)?.is_empty() => catalog.tagged(&source)?,
        _ => vec![catalog.resolve(&arguments.source, &Platform::host())?.image],
    };
    let ids: Vec<Digest> = images.into_iter().map(|image| image.id).collect();
    Ok(catalog.tag(&target, &ids, None)?)
}

pub fn remove(arguments: &Remove, world: &World) -> Result {
    let mut failed = false;
    for text in &arguments.images {
        match remove_one(text, arguments.force, &world.store) {
            Ok(()) => {}
            Err(failure) => {
                failure.report();
                failed = true;
            }
        }
    }
    if failed { Err(Failure::Shown(1)) } else { Ok(()) }
}

fn remove_one(text: &str, force: bool, store: &Store) -> Result {
    let catalog = store.catalog();
    if let Ok(name) = text.parse::<Reference>() {
        let images = catalog.tagged(&name)?;
        if !images.is_empty() {
            catalog.untag(&name)?;
            say(format_args!("Untagged: {}", name.familiar()));
            return images.iter().try_for_each(|image| remove_unnamed(&image.id, store));
        }
    }
    let image = match catalog.resolve(text, &Platform::host()) {
        Ok(resolved) => resolved.image,
        Err(_) if force => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let names: Vec<Reference> =
        catalog.tags()?.into_iter().filter(|(_, tagged)| tagged.id == image.id).map(|(name, _)| name).collect();
    if names.len() > 1 && !force {
        return Err(Failure::new(format!(
            "{text} has {} names: {}",
            names.len(),
            names.iter().map(Reference::familiar).collect::<Vec<_>>().join(", ")
        ))
        .hint("forge rmi --force removes them all"));
    }
    for name in &names {
        catalog.untag(name)?;
        say(format_args!("Untagged: {}", name.familiar()));
    }
    remove_unnamed(&image.id, store)
}

/// The image itself goes with its last name; its layers go with the next `forge prune`, unless something else uses them.
fn remove_unnamed(id: &Digest, store: &Store) -> Result {
    let catalog = store.catalog();
    if catalog.tags()?.iter().any(|(_, image)| image.id == *id) {
        return Ok(());
    }
    catalog.remove(id)?;
    print(format_args!("Deleted: {id}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_a_tag_lists_every_tag() {
        let reference = |text: &str| text.parse::<Reference>().expect(text);
        let check = |wanted: &str, name: &str| matches(&reference(wanted), &reference(name), wanted);
        assert!(check("app", "app:v1"));
        assert!(check("app:v1", "app:v1"));
        assert!(!check("app:v2", "app:v1"));
        assert!(!check("apq", "app:v1"));
        assert!(check("localhost:5000/app", "localhost:5000/app:v1"));
    }

    #[test]
    fn ages_are_docker_words() {
        let ago = |seconds| age(&(jiff::Timestamp::now() - jiff::SignedDuration::from_secs(seconds)).to_string());
        assert_eq!(ago(5), "Less than a minute ago");
        assert_eq!(ago(61), "1 minute ago");
        assert_eq!(ago(7300), "2 hours ago");
        assert_eq!(ago(86_400 * 3), "3 days ago");
    }
}
