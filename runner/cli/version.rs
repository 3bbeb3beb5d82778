//! `forge version`.

use serde_json::json;

use super::{Result, print};

#[derive(clap::Args)]
pub struct Version {
    /// How to print it
    #[arg(long, value_name = "FORMAT", default_value = "text", value_parser = ["text", "json"])]
    format: String,
}

pub fn version(arguments: &Version) -> Result {
    let version = env!("CARGO_PKG_VERSION");
    let (os, architecture) = (std::env::consts::OS, std::env::consts::ARCH);
    match arguments.format.as_str() {
        "json" => print(json!({ "version": version, "os": os, "architecture": architecture })),
        _ => print(format_args!("forge {version} ({os}/{architecture})")),
    }
}
