//! A blob on its way there: one `POST`, one `PUT`. In pieces only where something refuses the whole.
//!
//! ```text
//! POST uploads/                    202, Location
//! PUT  Location?digest=…  (all)    201            every failure begins with a new POST: sessions do not survive
//!   413, or broken off twice:
//! POST uploads/                    202, Location
//! PATCH Location  (a piece)        202, Location  own count decides; the server's Range only after a failure
//! PUT  Location?digest=…  (empty)  201
//! ```

use forge_snapshotter::Digest;
use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, HeaderName, HeaderValue, LOCATION, RANGE};
use reqwest::{Method, Response};
use url::Url;

use super::error::Error;
use super::host::resolve_location;
use super::payload::Payload;
use super::repository::Repository;
use super::transport::{Lane, Request, failure};
use crate::Result;

/// Smaller pieces than this are not worth their round trips, and nothing sane refuses them.
const PIECE_MIN: u64 = 64 * 1024;
const CHUNK_MIN_LENGTH: HeaderName = HeaderName::from_static("oci-chunk-min-length");

/// Why a whole upload did not arrive.
enum Failed {
    /// A new session may do better.
    Passing(crate::Error),
    TooLarge(crate::Error),
    Final(crate::Error),
}

pub(super) async fn upload(
    repository: &Repository,
    digest: &Digest,
    payload: &Payload,
    opened: Option<Url>,
) -> Result<()> {
    let endpoint = repository.endpoint();
    let chunk = endpoint.transport.options().upload_chunk_bytes;
    let slots = &endpoint.uploads;
    let _slot = slots.acquire().await.expect("the semaphore is never closed");
    let mut session = opened;
    let mut broken = 0;
    for attempt in 1.. {
        let location = match session.take() {
            Some(location) => location,
            None => begin(repository).await?.location,
        };
        let request = data_request(Method::PUT, with_digest(location, digest), payload.clone());
        let url = request.url.clone();
        let outcome = repository.send(request, &repository.push()).await;
        let wait = endpoint.transport.wait_before(&outcome, attempt);
        let error = match judge(outcome).await {
            Ok(()) => return Ok(()),
            Err(Failed::Final(error)) => return Err(error),
            Err(Failed::TooLarge(_)) => return in_pieces(repository, digest, payload, chunk).await,
            Err(Failed::Passing(error)) => error,
        };
        broken += u32::from(is_break(&error));
        if broken >= 2 && payload.length() > chunk {
            return in_pieces(repository, digest, payload, chunk).await;
        }
        if attempt >= endpoint.transport.options().tries {
            return Err(error);
        }
        let wait = wait.unwrap_or_else(|| super::retry::backoff(attempt - 1));
        endpoint.transport.announce(&url, &Err(error), wait);
        tokio::time::sleep(wait).await;
    }
    unreachable!("the loop ends by returning")
}

fn is_break(error: &crate::Error) -> bool {
    matches!(error, crate::Error::Registry(error) if error.is_break())
}

async fn judge(outcome: Result<Response>) -> Result<(), Failed> {
    let response = match outcome {
        Ok(response) => response,
        Err(error) => {
            return Err(if is_break(&error) { Failed::Passing(error) } else { Failed::Final(error) });
        }
    };
    let status = response.status().as_u16();
    if matches!(status, 200 | 201 | 204) {
        return Ok(());
    }
    let error = failure(&Method::PUT, response).await;
    let says = |words: &[&str]| matches!(&error, crate::Error::Registry(error) if error.says(words));
    Err(match status {
        413 => Failed::TooLarge(error),
        400 if says(&["size_invalid", "too large"]) => Failed::TooLarge(error),
        400 if says(&["digest_invalid"]) => Failed::Final(error),
        404 | 408 | 416 | 425 | 429 | 499 | 500 | 502..=504 | 520..=524 => Failed::Passing(error),
        _ => Failed::Final(error),
    })
}

struct Session {
    location: Url,
    /// The least that the registry takes as one piece.
    piece_min: u64,
}

async fn begin(repository: &Repository) -> Result<Session> {
    let url = repository.endpoint().url(repository.name(), "blobs/uploads/").await?;
    let response = repository.send(Request::new(Method::POST, url, Lane::Metadata), &repository.push()).await?;
    if !matches!(response.status().as_u16(), 200..=202 | 204) {
        return Err(failure(&Method::POST, response).await);
    }
    let header = response.headers().get(CHUNK_MIN_LENGTH).and_then(|value| value.to_str().ok());
    let piece_min = header.and_then(|text| text.parse().ok()).unwrap_or(0);
    Ok(Session { location: location(&response)?, piece_min })
}

/// Where the next request of a session goes.
pub(super) fn location(response: &Response) -> Result<Url> {
    let url = response.url();
    let refused = |reason: String| Error::refused(&Method::POST, url, reason);
    let text = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let text = text.ok_or_else(|| refused("the registry opened an upload without a Location".to_owned()))?;
    Ok(resolve_location(url, text).map_err(refused)?)
}

/// The query that is there is kept as it is: it may be signed.
fn with_digest(mut location: Url, digest: &Digest) -> Url {
    let own = format!("digest={}:{}", digest.algorithm(), digest.hex());
    let query = match location.query().filter(|query| !query.is_empty()) {
        Some(query) => format!("{query}&{own}"),
        None => own,
    };
    location.set_query(Some(&query));
    location
}

fn data_request(method: Method, url: Url, payload: Payload) -> Request {
    Request::new(method, url, Lane::Blob)
        .once()
        .header(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))
        .with_payload(payload)
}

/// Pieces, halved while they are still too large; one new session for each failure that the old one cannot explain.
pub(super) async fn in_pieces(
    repository: &Repository,
    digest: &Digest,
    payload: &Payload,
    mut piece: u64,
) -> Result<()> {
    let options = repository.endpoint().transport.options();
    let mut attempt = 0;
    loop {
        attempt += 1;
        let session = begin(repository).await?;
        let error = match send_pieces(repository, session, payload, piece, digest).await {
            Ok(()) => return Ok(()),
            Err(Failed::Final(error)) => return Err(error),
            Err(Failed::TooLarge(_)) if piece > PIECE_MIN => {
                piece = (piece / 2).max(PIECE_MIN);
                attempt = 0;
                continue;
            }
            Err(Failed::TooLarge(error)) | Err(Failed::Passing(error)) => error,
        };
        if attempt >= options.tries {
            return Err(error);
        }
        tokio::time::sleep(super::retry::backoff(attempt - 1)).await;
    }
}

async fn send_pieces(
    repository: &Repository,
    session: Session,
    payload: &Payload,
    piece: u64,
    digest: &Digest,
) -> Result<(), Failed> {
    let total = payload.length();
    let piece = piece.max(session.piece_min);
    let mut location = session.location;
    let mut offset = 0;
    let mut contradictions = 0;
    while offset < total {
        let length = piece.min(total - offset);
        let range = format!("{offset}-{}", offset + length - 1);
        let range = HeaderValue::from_str(&range).expect("digits are a header value");
        let request = data_request(Method::PATCH, location.clone(), payload.part(offset, length));
        let outcome = repository.send(request.header(CONTENT_RANGE, range), &repository.push()).await;
        match outcome {
            Ok(response) if matches!(response.status().as_u16(), 200..=202 | 204) => {
                location = self::location(&response).unwrap_or(location);
                offset += length;
            }
            // Only now is the server asked how far it got: some of them count wrong while all goes well.
            outcome if contradictions < 2 && may_resume(&outcome) => {
                contradictions += 1;
                match received(repository, &location).await {
                    Some((next, at)) if at <= total && at >= offset => (location, offset) = (next, at),
                    _ => return judge(outcome).await.and(Err(unexplained(&location))),
                }
            }
            outcome => return judge(outcome).await.and(Err(unexplained(&location))),
        }
    }
    let request = data_request(Method::PUT, with_digest(location, digest), Payload::Empty);
    judge(repository.send(request, &repository.push()).await).await
}

fn unexplained(location: &Url) -> Failed {
    Failed::Final(Error::refused(&Method::PATCH, location, "the registry lost its place in the upload").into())
}

fn may_resume(outcome: &Result<Response>) -> bool {
    match outcome {
        Ok(response) => matches!(response.status().as_u16(), 416 | 408 | 429 | 500 | 502..=504),
        Err(error) => is_break(error),
    }
}

/// `Range: 0-N` of the session's own state.
async fn received(repository: &Repository, location: &Url) -> Option<(Url, u64)> {
    let request = Request::new(Method::GET, location.clone(), Lane::Metadata);
    let response = repository.send(request, &repository.push()).await.ok()?;
    if !matches!(response.status().as_u16(), 200 | 202 | 204) {
        return None;
    }
    let range = response.headers().get(RANGE)?.to_str().ok()?;
    let end: u64 = range.trim_start_matches("bytes=").split_once('-')?.1.parse().ok()?;
    // `0-0` means both nothing and one byte; one byte sent twice is the lesser evil, refused by its digest.
    let offset = if end == 0 { 0 } else { end.checked_add(1)? };
    Some((self::location(&response).unwrap_or_else(|_| location.clone()), offset))
}
