//! A bounded client of the OCI distribution protocol: manifests, tags and small blobs of the registries that the operator
//! configured.

mod acr;
mod auth;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use http::{Method, StatusCode};
use replank_core::fault::{Class, Fault};
use replank_core::words::{Digest, Millis};
use reqwest::{Body, Client, Response, Url};
use serde::Deserialize;

pub use acr::MachineIdentity;
pub use auth::Credentials;

/// The distribution specification lets registries refuse larger manifests.
const MANIFEST_MAX: usize = 4 << 20;
/// Image configurations hold labels and history; 4 MiB is far beyond real ones.
const CONFIG_MAX: usize = 4 << 20;
/// Tags of one repository that are looked at. Beyond it a clean-up would not know what it deletes, so it stops.
pub const TAGS_MAX: usize = 10_000;
const TAGS_PAGE: usize = 1_000;
/// A page of tags: at most 128 bytes a tag, with room.
const TAGS_PAGE_MAX: usize = 1 << 20;
const ERROR_MAX: usize = 8 << 10;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// One request and its answer; all bodies are small.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// A blob may be served from a storage service that the registry names.
const REDIRECTS_MAX: usize = 3;

const INDEX_TYPES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const ACCEPT: &str = "application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";

/// Who may be spoken to, and how.
#[derive(Debug, Clone, Default)]
pub struct OciConfig {
    /// By registry host, with its port where it has one.
    pub credentials: BTreeMap<String, Credentials>,
    /// Hosts other than loopback that are spoken to without TLS.
    pub insecure: BTreeSet<String>,
    /// Azure registries by their host: who has no credentials there signs in as the machine.
    pub machine: BTreeMap<String, MachineIdentity>,
}

/// A manifest as it was served, checked against its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub digest: Digest,
    pub media_type: String,
    pub bytes: Vec<u8>,
}

/// What an image's configuration says that matters here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ImageFacts {
    pub created_at: Option<Millis>,
    pub labels: BTreeMap<String, String>,
}

#[derive(Debug)]
pub struct OciClient {
    config: OciConfig,
    plain: Client,
    secure: Result<Client, String>,
    /// Bearer tokens by repository and action; fetched again when they are refused.
    tokens: Mutex<BTreeMap<String, String>>,
}

/// A repository split into the registry that has it and its name there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) host: String,
    pub(crate) name: String,
    base: Url,
}

pub(crate) fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(""),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The registry's host of a repository; `None` where it names none and so is only in an engine.
pub fn registry_host(repository: &str) -> Option<&str> {
    let (host, _) = repository.split_once('/')?;
    (host.contains(['.', ':']) || host == "localhost").then_some(host)
}

fn is_name(name: &str) -> bool {
    let part = |p: &str| {
        p.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-'))
            && p.starts_with(|c: char| c.is_ascii_alphanumeric())
            && p.ends_with(|c: char| c.is_ascii_alphanumeric())
    };
    name.len() <= 255 && name.split('/').all(part)
}

pub(crate) fn is_tag(tag: &str) -> bool {
    (1..=128).contains(&tag.len())
        && tag.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

impl OciClient {
    pub fn new(config: OciConfig) -> Result<Self, Fault> {
        // Refused where a provider is installed already: then there is one, which is all that is needed.
        let _installed = rustls::crypto::ring::default_provider().install_default().is_ok();
        let builder = || {
            Client::builder()
                .redirect(reqwest::redirect::Policy::none())
                .no_proxy()
                .connect_timeout(CONNECT_TIMEOUT)
                .timeout(REQUEST_TIMEOUT)
        };
        let failed = |e: reqwest::Error| Fault::permanent("the registry client cannot be set up").because(e);
        Ok(Self {
            config,
            // A scratch image without CA certificates must still reach a registry on loopback.
            plain: builder().tls_certs_only([]).build().map_err(failed)?,
            secure: builder().https_only(true).build().map_err(|e| e.to_string()),
            tokens: Mutex::new(BTreeMap::new()),
        })
    }

    pub(crate) fn credentials(&self) -> &BTreeMap<String, Credentials> {
        &self.config.credentials
    }

    pub(crate) fn place(&self, repository: &str) -> Result<Place, Fault> {
        let bad = |why: &str| {
            Fault::permanent(format!("the repository {repository:?} cannot be used: {why}"))
                .advice("write it as registry.example.org/path/name, without a tag")
        };
        let host = registry_host(repository).ok_or_else(|| bad("it names no registry"))?;
        let name = &repository[host.len() + 1..];
        if !is_name(name) {
            return Err(bad("its name has characters that registries do not take"));
        }
        let plain = is_loopback(host) || self.config.insecure.contains(host);
        let base = Url::parse(&format!("{}://{host}/v2/{name}/", if plain { "http" } else { "https" }))
            .map_err(|_| bad("its host is not valid"))?;
        Ok(Place { host: host.to_owned(), name: name.to_owned(), base })
    }

    fn client(&self, url: &Url) -> Result<&Client, Fault> {
        if url.scheme() == "http" {
            return Ok(&self.plain);
        }
        self.secure.as_ref().map_err(|why| {
            Fault::permanent("the registry cannot be reached over TLS")
                .advice("mount the CA certificates of the host into the container")
                .because(why.clone())
        })
    }

    /// Sends one request, with whatever authorization the registry asks for.
    async fn send(
        &self,
        place: &Place,
        method: Method,
        url: Url,
        headers: &[(&str, &str)],
        body: Option<Vec<u8>>,
    ) -> Result<Response, Fault> {
        let actions = if method == Method::GET || method == Method::HEAD {
            "pull"
        } else if method == Method::DELETE {
            "delete"
        } else {
            "pull,push"
        };
        let scope = format!("repository:{}:{actions}", place.name);
        let slot = format!("{} {scope}", place.host);
        let mut authorization = self.tokens.lock().ok().and_then(|tokens| tokens.get(&slot).cloned());
        // Twice: once to be told how to authorize, once authorized.
        for last in [false, true] {
            let mut request = self.client(&url)?.request(method.clone(), url.clone());
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            if let Some(value) = &authorization {
                request = request.header("authorization", value);
            }
            if let Some(body) = &body {
                request = request.body(Body::from(body.clone()));
            }
            let response = request.send().await.map_err(|e| self.unreachable(place, e))?;
            if response.status() != StatusCode::UNAUTHORIZED || last {
                return Ok(response);
            }
            let challenge = response.headers().get("www-authenticate").and_then(|v| v.to_str().ok()).unwrap_or("");
            let credentials = self.config.credentials.get(&place.host);
            let value = match auth::challenge(challenge) {
                Some(auth::Challenge::Basic) if credentials.is_some() => credentials.map(Credentials::basic),
                Some(auth::Challenge::Bearer { service, .. })
                    if credentials.is_none() && self.config.machine.contains_key(&place.host) =>
                {
                    let service = service.unwrap_or_else(|| place.host.clone());
                    self.as_machine(place, &url, &service, &scope).await?
                }
                Some(auth::Challenge::Bearer { realm, service }) => {
                    let realm = auth::realm(&realm, place, &self.config)?;
                    Some(
                        auth::token(self.client(&realm)?, realm, service.as_deref(), &scope, credentials, place)
                            .await?,
                    )
                }
                Some(auth::Challenge::Basic) | None => None,
            };
            let Some(value) = value else { return Ok(response) };
            if let Ok(mut tokens) = self.tokens.lock() {
                tokens.insert(slot.clone(), value.clone());
            }
            authorization = Some(value);
        }
        Err(Fault::permanent(format!("the registry {} cannot be used", place.host)))
    }

    async fn as_machine(&self, place: &Place, url: &Url, service: &str, scope: &str) -> Result<Option<String>, Fault> {
        let Some(machine) = self.config.machine.get(&place.host) else { return Ok(None) };
        // What this registry calls reading a list of tags.
        let scope = scope.replace(":pull", ":pull,metadata_read");
        machine.authorize(&self.plain, self.client(url)?, place, service, &scope).await
    }

    fn unreachable(&self, place: &Place, error: reqwest::Error) -> Fault {
        Fault::transient(format!("the registry {} cannot be reached", place.host))
            .advice("check the registry's address, and that it runs")
            .because(error.without_url())
    }

    /// A fault by status code, with what the registry says about it.
    async fn refused(&self, place: &Place, doing: &str, response: Response) -> Fault {
        let status = response.status();
        let text = read(response, ERROR_MAX).await.map(|b| String::from_utf8_lossy(&b).into_owned());
        let (class, advice) = match status.as_u16() {
            401 => (Class::Permanent, "give valid credentials for this registry in the configuration"),
            403 => (Class::Permanent, "give the configured credentials the right to do this in the registry"),
            405 => (
                Class::Permanent,
                "allow this in the registry's configuration (in maintenance it takes no uploads, and deleting is off by default)",
            ),
            404 => (Class::Permanent, "check the repository's name"),
            408 | 425 | 429 => (Class::Transient, ""),
            500..=599 => (Class::Transient, "look at the registry's log for the cause"),
            _ => (Class::Permanent, ""),
        };
        Fault::new(class, format!("the registry {} refused {doing} with status {}", place.host, status.as_u16()))
            .advice(advice)
            .because(text.unwrap_or_default())
    }

    fn url(&self, place: &Place, path: &str) -> Result<Url, Fault> {
        place.base.join(path).map_err(|e| Fault::permanent("a registry address cannot be made").because(e))
    }

    /// The digest under a tag or digest; `None` where the registry has no such manifest.
    pub async fn head(&self, repository: &str, reference: &str) -> Result<Option<Digest>, Fault> {
        let place = self.place(repository)?;
        let url = self.url(&place, &format!("manifests/{reference}"))?;
        let response = self.send(&place, Method::HEAD, url, &[("accept", ACCEPT)], None).await?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(None),
            s if s.is_success() => {
                let digest = response.headers().get("docker-content-digest").and_then(|v| v.to_str().ok());
                match digest.and_then(|d| Digest::new(d).ok()) {
                    Some(digest) => Ok(Some(digest)),
                    // The header is optional in the specification; the body never lies about its own digest.
                    None => Ok(self.manifest(repository, reference).await?.map(|m| m.digest)),
                }
            }
            _ => Err(self.refused(&place, &format!("to show {repository}:{reference}"), response).await),
        }
    }

    /// A manifest by tag or digest, its digest computed from its bytes and compared with what the registry says.
    pub async fn manifest(&self, repository: &str, reference: &str) -> Result<Option<Manifest>, Fault> {
        let place = self.place(repository)?;
        let url = self.url(&place, &format!("manifests/{reference}"))?;
        let response = self.send(&place, Method::GET, url, &[("accept", ACCEPT)], None).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        if !response.status().is_success() {
            return Err(self.refused(&place, &format!("to show {repository}:{reference}"), response).await);
        }
        let header = |name: &str| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let (told, media_type) = (header("docker-content-digest"), header("content-type").unwrap_or_default());
        let bytes = read(response, MANIFEST_MAX).await?;
        let digest = Digest::of(&bytes);
        let asked = reference.starts_with("sha256:").then_some(reference);
        if [told.as_deref(), asked].into_iter().flatten().any(|other| other != digest.as_str()) {
            return Err(Fault::permanent(format!(
                "the registry {} serves {repository} under a wrong digest",
                place.host
            ))
            .advice("treat the registry as damaged or hostile, and check it"));
        }
        Ok(Some(Manifest { digest, media_type, bytes }))
    }

    /// Labels and creation time of an image. An index speaks through its first image, since labels are the same on each.
    pub async fn facts(&self, repository: &str, manifest: &Manifest) -> Result<ImageFacts, Fault> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Doc {
            #[serde(default)]
            media_type: String,
            config: Option<Descriptor>,
            manifests: Option<Vec<Descriptor>>,
        }
        #[derive(Deserialize)]
        struct Descriptor {
            digest: String,
            #[serde(default)]
            platform: Option<Platform>,
        }
        #[derive(Deserialize)]
        struct Platform {
            #[serde(default)]
            os: String,
        }
        #[derive(Deserialize)]
        struct Config {
            created: Option<String>,
            config: Option<Inner>,
        }
        #[derive(Deserialize)]
        struct Inner {
            #[serde(rename = "Labels")]
            labels: Option<BTreeMap<String, String>>,
        }
        let bad = |e: &dyn std::fmt::Display| {
            Fault::permanent(format!("a manifest of {repository} cannot be read: {e}"))
                .advice("it is not an image; check what pushes to this repository")
        };
        let mut doc: Doc = serde_json::from_slice(&manifest.bytes).map_err(|e| bad(&e))?;
        if doc.manifests.is_some() || INDEX_TYPES.contains(&doc.media_type.as_str()) {
            let real = |d: &Descriptor| d.platform.as_ref().is_none_or(|p| p.os != "unknown");
            let Some(first) = doc.manifests.unwrap_or_default().into_iter().find(real) else {
                return Ok(ImageFacts::default());
            };
            let digest = Digest::new(first.digest).map_err(|e| bad(&e))?;
            let inner =
                self.manifest(repository, digest.as_str()).await?.ok_or_else(|| bad(&"its image is missing"))?;
            doc = serde_json::from_slice(&inner.bytes).map_err(|e| bad(&e))?;
        }
        let Some(config) = doc.config else { return Ok(ImageFacts::default()) };
        let digest = Digest::new(config.digest).map_err(|e| bad(&e))?;
        let bytes = self.blob(repository, &digest).await?;
        let config: Config = serde_json::from_slice(&bytes).map_err(|e| bad(&e))?;
        Ok(ImageFacts {
            created_at: config.created.as_deref().and_then(millis),
            labels: config.config.and_then(|c| c.labels).unwrap_or_default(),
        })
    }

    /// A small blob, checked against its digest.
    async fn blob(&self, repository: &str, digest: &Digest) -> Result<Vec<u8>, Fault> {
        let place = self.place(repository)?;
        let url = self.url(&place, &format!("blobs/{digest}"))?;
        let mut response = self.send(&place, Method::GET, url, &[], None).await?;
        for _ in 0..REDIRECTS_MAX {
            if !response.status().is_redirection() {
                break;
            }
            let to = response.headers().get("location").and_then(|v| v.to_str().ok());
            let to = to.and_then(|to| response.url().join(to).ok());
            // Downgrades to plain HTTP are not followed, and credentials do not go along.
            let Some(to) = to.filter(|to| to.scheme() == place.base.scheme() || to.scheme() == "https") else {
                return Err(Fault::permanent(format!("the registry {} redirects to a forbidden address", place.host)));
            };
            response = self.client(&to)?.get(to).send().await.map_err(|e| self.unreachable(&place, e))?;
        }
        if !response.status().is_success() {
            return Err(self.refused(&place, &format!("to give a blob of {repository}"), response).await);
        }
        let bytes = read(response, CONFIG_MAX).await?;
        if Digest::of(&bytes) != *digest {
            return Err(Fault::permanent(format!("the registry {} serves a blob under a wrong digest", place.host))
                .advice("treat the registry as damaged or hostile, and check it"));
        }
        Ok(bytes)
    }

    pub async fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) -> Result<(), Fault> {
        if !is_tag(tag) {
            return Err(Fault::permanent(format!("{tag:?} is not a tag")));
        }
        let place = self.place(repository)?;
        let url = self.url(&place, &format!("manifests/{tag}"))?;
        let headers = [("content-type", media_type)];
        let response = self.send(&place, Method::PUT, url, &headers, Some(bytes.to_vec())).await?;
        if response.status().is_success() {
            return Ok(());
        }
        Err(self.refused(&place, &format!("to tag {repository}:{tag}"), response).await)
    }

    /// Uploads a small blob in one piece.
    pub(crate) async fn put_blob(&self, repository: &str, bytes: &[u8]) -> Result<Digest, Fault> {
        let place = self.place(repository)?;
        let url = self.url(&place, "blobs/uploads/")?;
        let response = self.send(&place, Method::POST, url, &[("content-length", "0")], Some(Vec::new())).await?;
        let location = response.headers().get("location").and_then(|v| v.to_str().ok());
        let upload = location.and_then(|to| place.base.join(to).ok());
        let same = |url: &Url| {
            url.host_str() == place.base.host_str() && url.port_or_known_default() == place.base.port_or_known_default()
        };
        let Some(mut upload) = upload.filter(|url| response.status().is_success() && same(url)) else {
            return Err(self.refused(&place, &format!("an upload to {repository}"), response).await);
        };
        let digest = Digest::of(bytes);
        upload.query_pairs_mut().append_pair("digest", digest.as_str());
        let headers = [("content-type", "application/octet-stream")];
        let response = self.send(&place, Method::PUT, upload, &headers, Some(bytes.to_vec())).await?;
        if response.status().is_success() {
            return Ok(digest);
        }
        Err(self.refused(&place, &format!("an upload to {repository}"), response).await)
    }

    /// What time the registry of a repository says that it is, to a second; `None` where it says nothing about it.
    pub async fn time(&self, repository: &str) -> Result<Option<Millis>, Fault> {
        let place = self.place(repository)?;
        let url = self.url(&place, "/v2/")?;
        let answer = self.client(&url)?.get(url).send().await.map_err(|e| self.unreachable(&place, e))?;
        Ok(crate::http_date::of(answer.headers()))
    }

    /// Begins an upload and gives it up: whether the credentials may push, and whether the registry takes anything now.
    pub async fn try_upload(&self, repository: &str) -> Result<(), Fault> {
        let place = self.place(repository)?;
        let url = self.url(&place, "blobs/uploads/")?;
        let response = self.send(&place, Method::POST, url, &[("content-length", "0")], Some(Vec::new())).await?;
        if !response.status().is_success() {
            return Err(self.refused(&place, &format!("an upload to {repository}"), response).await);
        }
        // Left alone, the registry ends it itself after some days.
        if let Some(to) = response.headers().get("location").and_then(|v| v.to_str().ok())
            && let Ok(to) = place.base.join(to)
            && to.origin() == place.base.origin()
        {
            self.send(&place, Method::DELETE, to, &[], None).await?;
        }
        Ok(())
    }

    /// Every tag of a repository; empty where the registry does not know it.
    pub async fn tags(&self, repository: &str) -> Result<Vec<String>, Fault> {
        #[derive(Deserialize)]
        struct Page {
            tags: Option<Vec<String>>,
        }
        let place = self.place(repository)?;
        let mut tags = Vec::new();
        let mut next = Some(self.url(&place, &format!("tags/list?n={TAGS_PAGE}"))?);
        // A registry may make its pages as small as it likes, but not endless.
        for _ in 0..TAGS_MAX {
            let Some(url) = next.take() else { return Ok(tags) };
            let response = self.send(&place, Method::GET, url.clone(), &[], None).await?;
            if response.status() == StatusCode::NOT_FOUND {
                return Ok(tags);
            }
            if !response.status().is_success() {
                return Err(self.refused(&place, &format!("to list the tags of {repository}"), response).await);
            }
            let link = response.headers().get("link").and_then(|v| v.to_str().ok()).map(str::to_owned);
            let bytes = read(response, TAGS_PAGE_MAX).await?;
            let page: Page = serde_json::from_slice(&bytes)
                .map_err(|e| Fault::permanent(format!("the tags of {repository} cannot be read")).because(e))?;
            tags.extend(page.tags.unwrap_or_default().into_iter().filter(|tag| is_tag(tag)));
            if tags.len() > TAGS_MAX {
                break;
            }
            next = link.as_deref().and_then(|link| next_page(link, &url));
        }
        if next.is_none() && tags.len() <= TAGS_MAX {
            return Ok(tags);
        }
        Err(Fault::permanent(format!("{repository} has more than {TAGS_MAX} tags"))
            .advice("delete old tags by hand; nothing is deleted while not all tags can be seen"))
    }

    /// Deletes a manifest, and with it every tag on it. True where it was there.
    pub async fn delete_manifest(&self, repository: &str, digest: &Digest) -> Result<bool, Fault> {
        match self.delete(repository, digest.as_str()).await? {
            Ok(there) => Ok(there),
            Err((place, response)) => {
                Err(self.refused(&place, &format!("to delete {repository}@{digest}"), response).await)
            }
        }
    }

    /// Deletes one tag alone. `None` where the registry cannot do that, else whether it was there.
    pub async fn delete_tag(&self, repository: &str, tag: &str) -> Result<Option<bool>, Fault> {
        match self.delete(repository, tag).await? {
            Ok(there) => Ok(Some(there)),
            // Registries from before that part of the specification answer one of these.
            Err((_, r)) if matches!(r.status().as_u16(), 400 | 405 | 415) => Ok(None),
            Err((place, r)) => Err(self.refused(&place, &format!("to delete {repository}:{tag}"), r).await),
        }
    }

    async fn delete(&self, repository: &str, reference: &str) -> Result<Result<bool, (Place, Response)>, Fault> {
        let place = self.place(repository)?;
        let url = self.url(&place, &format!("manifests/{reference}"))?;
        let response = self.send(&place, Method::DELETE, url, &[], None).await?;
        Ok(match response.status() {
            StatusCode::NOT_FOUND => Ok(false),
            s if s.is_success() => Ok(true),
            _ => Err((place, response)),
        })
    }
}

pub(crate) fn millis(rfc3339: &str) -> Option<Millis> {
    let at: jiff::Timestamp = rfc3339.parse().ok()?;
    Some(Millis(at.as_millisecond()))
}

/// The next page of a listing, if it is on the same server.
fn next_page(link: &str, from: &Url) -> Option<Url> {
    let (target, parameters) = link.strip_prefix('<')?.split_once('>')?;
    let is_next = parameters.split(';').any(|p| matches!(p.trim(), "rel=\"next\"" | "rel=next"));
    let next = from.join(target).ok().filter(|_| is_next)?;
    (next.origin() == from.origin()).then_some(next)
}

/// A whole body of at most `max` bytes.
async fn read(mut response: Response, max: usize) -> Result<Vec<u8>, Fault> {
    let mut bytes = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if bytes.len() + chunk.len() <= max => bytes.extend_from_slice(&chunk),
            Ok(Some(_)) => {
                return Err(Fault::permanent(format!("the registry answers with more than {max} bytes"))
                    .advice("check that the address is a registry's"));
            }
            Ok(None) => return Ok(bytes),
            Err(e) => return Err(Fault::transient("the registry's answer broke off").because(e.without_url())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_taken_apart() {
        let config = OciConfig { insecure: ["plain.example:5000".to_owned()].into(), ..OciConfig::default() };
        let client = OciClient::new(config).expect("client");
        for (repository, expect) in [
            ("127.0.0.1:5000/app/api", Some("http://127.0.0.1:5000/v2/app/api/")),
            ("localhost:5000/app", Some("http://localhost:5000/v2/app/")),
            ("[::1]:5000/app", Some("http://[::1]:5000/v2/app/")),
            ("registry.example/app", Some("https://registry.example/v2/app/")),
            ("plain.example:5000/app", Some("http://plain.example:5000/v2/app/")),
            ("app/api", None),
            ("app", None),
            ("registry.example/App", None),
            ("registry.example/../x", None),
            ("registry.example/a//b", None),
            ("registry.example/a?b", None),
            ("evil@registry.example/a%2fb", None),
        ] {
            let place = client.place(repository).ok();
            assert_eq!(place.map(|p| p.base.to_string()).as_deref(), expect, "{repository}");
        }
    }

    #[test]
    fn pages_stay_on_their_server() {
        let from = Url::parse("http://127.0.0.1:5000/v2/a/tags/list?n=2").expect("url");
        for (link, expect) in [
            ("</v2/a/tags/list?last=b&n=2>; rel=\"next\"", Some("http://127.0.0.1:5000/v2/a/tags/list?last=b&n=2")),
            ("<http://evil.example/v2/a>; rel=\"next\"", None),
            ("</v2/a>; rel=\"prev\"", None),
            ("nonsense", None),
        ] {
            assert_eq!(next_page(link, &from).map(|u| u.to_string()).as_deref(), expect, "{link}");
        }
    }
}
