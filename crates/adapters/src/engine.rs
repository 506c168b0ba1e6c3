//! The way to a Docker engine over its Unix socket, and what its errors mean.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bollard::errors::Error;
use bollard::{ClientVersion, Docker};
use replank_core::fault::{Class, Fault};

/// Longest wait for an engine to begin its answer. Streams and waits are not bounded by it: only the answer's head is.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);

/// The newest API that Debian's 20.10 engine speaks; every later engine up to 28 still takes it.
pub const API_VERSION: ClientVersion = ClientVersion { major_version: 1, minor_version: 41 };

/// A reachable engine. Cloning is cheap and shares nothing but the address: each request has its own connection.
#[derive(Debug, Clone)]
pub struct Engine {
    docker: Docker,
    socket: PathBuf,
}

impl Engine {
    /// Opens nothing: the engine may be down now and up when it is needed. A socket that is not there is transient, since
    /// an engine that restarts makes it anew.
    pub fn connect(socket: &Path) -> Result<Self, Fault> {
        let doing = || format!("the Docker engine at {} cannot be reached", socket.display());
        let Some(path) = socket.to_str() else {
            return Err(Fault::permanent(doing()).advice("give the engine's socket a path in UTF-8"));
        };
        let docker = Docker::connect_with_unix(path, ANSWER_TIMEOUT.as_secs(), &API_VERSION)
            .map_err(|error| classify(error, &doing()))?
            .with_request_modifier(url_safe_auth);
        Ok(Self { docker, socket: socket.to_owned() })
    }

    pub fn docker(&self) -> &Docker {
        &self.docker
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

/// bollard encodes `X-Registry-Auth` in the standard base64 alphabet; the engine reads the URL-safe one and silently goes
/// on without credentials where it meets a '+' or a '/'.
fn url_safe_auth(mut request: bollard::BollardRequest) -> bollard::BollardRequest {
    if let Some(value) = request.headers_mut().get_mut("x-registry-auth")
        && let Ok(text) = value.to_str()
        && let Ok(mut safe) = http::HeaderValue::from_str(&text.replace('+', "-").replace('/', "_"))
    {
        safe.set_sensitive(true);
        *value = safe;
    }
    request
}

/// True where the engine says that the thing asked for does not exist.
pub fn is_missing(error: &Error) -> bool {
    matches!(error, Error::DockerResponseServerError { status_code: 404, .. })
}

/// What an engine's error means, by its type and status code. `doing` is a sentence without a full stop that says what
/// failed: "the image app/api:v1 cannot be inspected".
pub fn classify(error: Error, doing: &str) -> Fault {
    let (class, advice) = verdict(&error);
    // The library's own words for this name its parts, not what is wrong.
    if matches!(&error, Error::HyperLegacyError { err } if err.is_connect()) {
        return Fault::new(class, format!("{doing}: the Docker engine cannot be reached")).advice(advice);
    }
    Fault::new(class, doing).advice(advice).because(error)
}

/// Class and advice of each kind of error; a new kind in the library is looked at by the compiler, not by luck.
fn verdict(error: &Error) -> (Class, &'static str) {
    const START: &str = "check that the Docker engine runs and that its socket is mounted and may be used";
    const OUR_FAULT: &str =
        "this is a defect or an engine too old or too new for Replank; report it with the engine's version";
    match error {
        Error::DockerResponseServerError { status_code, .. } => status(*status_code),
        // The head of the answer never came: the engine may have done what was asked.
        Error::RequestTimeoutError => (Class::Indeterminate, START),
        Error::SocketNotFoundError(_) => (Class::Transient, START),
        // Not connected means not asked; anything later may have had its effect.
        Error::HyperLegacyError { err } if err.is_connect() => (Class::Transient, START),
        Error::HyperLegacyError { .. } | Error::HyperResponseError { .. } | Error::IOError { .. } => {
            (Class::Indeterminate, START)
        }
        // Said by the engine in the middle of a stream, as text alone: callers that know more decide themselves.
        Error::DockerStreamError { .. } => (Class::Permanent, ""),
        Error::DockerContainerWaitError { .. } => (Class::Indeterminate, ""),
        Error::JsonDataError { .. } | Error::JsonSerdeError { .. } | Error::StrParseError { .. } => {
            (Class::Indeterminate, OUR_FAULT)
        }
        Error::NoHomePathError
        | Error::CertPathError { .. }
        | Error::CertMultipleKeys { .. }
        | Error::CertParseError { .. }
        | Error::NoNativeCertsError { .. }
        | Error::LoadNativeCertsErrors { .. }
        | Error::APIVersionParseError {}
        | Error::MissingSessionBuildkitError {}
        | Error::MissingVersionBuildkitError {}
        | Error::StrFmtError { .. }
        | Error::HttpClientError { .. }
        | Error::URLEncodedError { .. }
        | Error::URLParseError { .. }
        | Error::InvalidURIError { .. }
        | Error::InvalidURIPartsError { .. }
        | Error::UnsupportedURISchemeError { .. }
        | Error::HttpHeaderNotFoundError(_)
        | Error::HttpHeaderToStrError { .. }
        | Error::Base64DecodeError { .. } => (Class::Permanent, OUR_FAULT),
    }
}

/// What a status code of the engine's API means for the one who asked.
pub fn status(code: u16) -> (Class, &'static str) {
    match code {
        401 | 403 => (Class::Permanent, "check the credentials and rights that the configuration gives"),
        408 | 429 | 502 | 503 | 504 => (Class::Transient, ""),
        // In use, name taken, already in progress: somebody else was there first.
        409 => (Class::Conflict, ""),
        404 => (Class::Permanent, "it is not there, or not any more; look at what the engine has"),
        400..=499 => (Class::Permanent, ""),
        // 500 covers a full disk and a failed mount as well as an engine that is going down. All of these can pass, and
        // some had their effect first.
        500..=599 => (Class::Indeterminate, "look at the engine's log for the cause"),
        _ => (Class::Indeterminate, ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_follow_the_status_code() {
        for (code, expect) in [
            (400, Class::Permanent),
            (401, Class::Permanent),
            (403, Class::Permanent),
            (404, Class::Permanent),
            (409, Class::Conflict),
            (429, Class::Transient),
            (500, Class::Indeterminate),
            (503, Class::Transient),
        ] {
            let error = Error::DockerResponseServerError { status_code: code, message: "no".to_owned() };
            assert_eq!(classify(error, "x").class, expect, "{code}");
        }
    }

    #[test]
    fn a_missing_socket_may_come_back() {
        let fault = Engine::connect(Path::new("/nonexistent/docker.sock")).expect_err("no socket");
        assert_eq!(fault.class, Class::Transient);
        assert!(fault.told().sentence().contains("/nonexistent/docker.sock"), "{}", fault.told().sentence());
    }

    #[test]
    fn credentials_are_sent_in_the_alphabet_that_the_engine_reads() {
        let request = http::Request::builder()
            .header("X-Registry-Auth", "ab+/cd==")
            .body(bollard::body_full(bytes::Bytes::new()))
            .expect("request");
        assert_eq!(url_safe_auth(request).headers()["x-registry-auth"], "ab-_cd==");
    }
}
