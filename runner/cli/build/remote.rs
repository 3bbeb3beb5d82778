//! Files from elsewhere: `ADD https://…`, git repositories, and contexts named by URL.
//!
//! git itself does the fetching of repositories (submodules, credentials, sha256 repositories and ssh come with it), in an
//! environment without prompts, hooks or system configuration. What arrives lies below the store's `ingest`.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use forge_frontend::Remote;
use forge_snapshotter::{Digest, Digester, IngestDir, Store};
use futures_util::StreamExt;
use tokio::io::AsyncWriteExt;

use super::context;
use crate::cli::error::{Doing, chain};
use crate::cli::{Failure, Result, World};

/// A remote that is here now: a directory, and the path within it that was asked for.
pub struct Fetched {
    pub directory: IngestDir,
    pub path: String,
}

pub async fn fetch(remote: &Remote, store: &Store) -> Result<Fetched> {
    match remote {
        Remote::Http { url, checksum, .. } => {
            let directory = store.ingest()?;
            let path = download(url, checksum.as_ref(), directory.path()).await?;
            Ok(Fetched { directory, path })
        }
        Remote::Git { url, reference, subdir, keep_git_dir, checksum, submodules } => {
            let directory = store.ingest()?;
            let wanted =
                Wanted { url, reference: reference.as_deref(), checksum: checksum.as_deref(), submodules: *submodules };
            checkout(&wanted, directory.path()).await?;
            if !keep_git_dir {
                remove_git_dir(directory.path()).await?;
            }
            Ok(Fetched { directory, path: subdir.clone().unwrap_or_default() })
        }
    }
}

/// A git repository or something to download, rather than a directory?
pub fn is_remote(context: &str) -> bool {
    ["http://", "https://", "git://", "ssh://", "git@", "file://"].iter().any(|scheme| context.starts_with(scheme))
        && !Path::new(context).exists()
}

/// `forge build URL`: the directory to build in, and what keeps it alive.
pub async fn context(url: &str, world: &World) -> Result<(PathBuf, IngestDir)> {
    let (address, fragment) = url.split_once('#').map_or((url, ""), |(address, fragment)| (address, fragment));
    let is_git = address.ends_with(".git") || !address.starts_with("http");
    let directory = world.store.ingest()?;
    if is_git {
        let (reference, subdir) = fragment.split_once(':').unwrap_or((fragment, ""));
        let wanted = Wanted {
            url: address,
            reference: Some(reference).filter(|r| !r.is_empty()),
            checksum: None,
            submodules: true,
        };
        checkout(&wanted, directory.path()).await?;
        let root =
            std::fs::canonicalize(directory.path().join(subdir)).doing(format_args!("find {subdir:?} in {address}"))?;
        let inside = root.starts_with(std::fs::canonicalize(directory.path()).doing("find the checkout")?);
        return match inside {
            true => Ok((root, directory)),
            false => Err(Failure::new(format!("{subdir:?} leads out of the repository"))),
        };
    }
    let name = download(url, None, directory.path()).await?;
    let file = directory.path().join(&name);
    let unpacked = world.store.ingest()?;
    let archive = std::fs::File::open(&file).doing("read the download")?;
    let root = unpacked.path().to_owned();
    let into = root.clone();
    let done = tokio::task::spawn_blocking(move || unpack_or_dockerfile(archive, &into)).await;
    done.map_err(|error| Failure::new(format!("unpacking {url}: {error}")))??;
    Ok((root, unpacked))
}

fn unpack_or_dockerfile(mut file: std::fs::File, into: &Path) -> Result {
    use std::io::{Read, Seek};
    let mut head = Vec::new();
    (&mut file).take(512).read_to_end(&mut head).doing("read the download")?;
    file.rewind().doing("read the download")?;
    match context::is_archive(&head) {
        true => context::unpack(file, into),
        false => {
            let mut target = std::fs::File::create(into.join("Dockerfile")).doing("keep the Dockerfile")?;
            std::io::copy(&mut file, &mut target).doing("keep the Dockerfile")?;
            Ok(())
        }
    }
}

/// Downloads into `into`, as the URL's last path segment (mode 0600, dated by `Last-Modified`); returns that name.
async fn download(url: &str, checksum: Option<&Digest>, into: &Path) -> Result<String> {
    let name = file_name(url)?;
    let client = reqwest::Client::builder()
        .user_agent(concat!("forge/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(30))
        .read_timeout(Duration::from_secs(60))
        .build()
        .map_err(|error| Failure::new(chain(&error)))?;
    let response = client.get(url).send().await.and_then(reqwest::Response::error_for_status);
    let response =
        response.map_err(|error| Failure::new(format!("failed to download {url}: {}", chain(&error.without_url()))))?;
    let modified = response.headers().get("last-modified").and_then(|value| value.to_str().ok()).and_then(http_date);
    let path = into.join(&name);
    let digest = write_body(response, &path).await.doing(format_args!("download {url}"))?;
    if let Some(expected) = checksum.filter(|expected| **expected != digest) {
        return Err(Failure::new(format!("{url} has digest {digest}, not {expected}"))
            .hint("if the file was meant to change, write its new digest into --checksum"));
    }
    settle(&path, modified.unwrap_or(0)).doing(format_args!("keep {name}"))?;
    Ok(name)
}

async fn write_body(response: reqwest::Response, path: &Path) -> Result<Digest> {
    let mut file = tokio::fs::File::create(path).await?;
    let mut digester = Digester::new();
    let mut body = response.bytes_stream();
    while let Some(chunk) = body.next().await {
        let chunk = chunk.map_err(|error| Failure::new(chain(&error)))?;
        digester.update(&chunk);
        file.write_all(&chunk).await?;
    }
    file.flush().await?;
    Ok(digester.finish())
}

fn settle(path: &Path, modified_seconds: i64) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let file = std::fs::File::options().write(true).open(path)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    let modified = u64::try_from(modified_seconds).unwrap_or(0);
    file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(modified))
}

fn http_date(text: &str) -> Option<i64> {
    let time = jiff::fmt::rfc2822::parse(text).ok()?;
    Some(time.timestamp().as_second())
}

/// The last path segment; a URL without one needs a destination that is a file.
fn file_name(url: &str) -> Result<String> {
    let parsed = url::Url::parse(url).map_err(|error| Failure::new(format!("{url:?}: {error}")))?;
    let name = parsed.path_segments().and_then(|mut segments| segments.next_back()).unwrap_or_default();
    let clean = !name.is_empty() && name != "." && name != ".." && !name.contains('\0');
    Ok(if clean { name.to_owned() } else { "download".to_owned() })
}

struct Wanted<'a> {
    url: &'a str,
    reference: Option<&'a str>,
    /// The commit that `reference` must be, or begin with.
    checksum: Option<&'a str>,
    submodules: bool,
}

/// A shallow checkout of one commit.
async fn checkout(wanted: &Wanted<'_>, into: &Path) -> Result {
    let reference = wanted.reference.unwrap_or("HEAD");
    if reference.starts_with('-') {
        return Err(Failure::new(format!("{reference:?} is not a git reference")));
    }
    git(into, ["init", "--quiet", "."]).await?;
    let fetched = git(into, ["fetch", "--quiet", "--depth=1", "--no-tags", "--", wanted.url, reference]).await;
    if let Err(shallow) = fetched {
        // A server that gives no single commits: fetch everything, then look for it.
        let all =
            git(into, ["fetch", "--quiet", "--tags", "--", wanted.url, "+refs/heads/*:refs/remotes/origin/*"]).await;
        let found = match all {
            Ok(_) => git(into, ["update-ref", "FETCH_HEAD", reference]).await,
            Err(error) => Err(error),
        };
        found.map_err(|_| shallow)?;
    }
    let commit = git(into, ["rev-parse", "--verify", "FETCH_HEAD^{commit}"]).await?;
    if let Some(expected) = wanted.checksum.filter(|expected| !commit.starts_with(*expected)) {
        return Err(Failure::new(format!("{}: {reference} is commit {commit}, not {expected}", wanted.url)));
    }
    git(into, ["checkout", "--quiet", "--detach", "FETCH_HEAD"]).await?;
    if wanted.submodules && into.join(".gitmodules").is_file() {
        git(into, ["submodule", "--quiet", "update", "--init", "--recursive", "--depth=1"]).await?;
    }
    Ok(())
}

async fn git<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(directory: &Path, arguments: I) -> Result<String> {
    let output = tokio::process::Command::new("git")
        .current_dir(directory)
        .args(["-c", "core.hooksPath=/dev/null", "-c", "protocol.ext.allow=never", "-c", "advice.detachedHead=false"])
        .args(arguments)
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env_remove("GIT_DIR")
        .env_remove("GIT_WORK_TREE")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await;
    match output {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        Ok(output) => Err(Failure::new(format!("git: {}", String::from_utf8_lossy(&output.stderr).trim()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(Failure::new("git is not installed")
                .hint("git sources are fetched by git: install it, or use a directory"))
        }
        Err(error) => Err(Failure::new(format!("git: {error}"))),
    }
}

/// `.git` of the checkout and, as a file, of its submodules.
async fn remove_git_dir(directory: &Path) -> Result {
    tokio::fs::remove_dir_all(directory.join(".git")).await.doing("remove .git")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downloads_are_named_by_the_last_segment() {
        for (url, name) in [
            ("https://example.com/a/b.tar.gz", "b.tar.gz"),
            ("https://example.com/b?x=/y", "b"),
            ("https://example.com/", "download"),
            ("https://example.com/a/..", "download"),
        ] {
            assert_eq!(file_name(url).expect(url), name);
        }
    }

    #[test]
    fn http_dates_are_read() {
        assert_eq!(http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784111777));
        assert_eq!(http_date("yesterday"), None);
    }
}
