//! The session of one build: what BuildKit may ask this side for while it builds. Files, named secrets and registry
//! credentials; nothing else is exposed.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bollard::health::health_check_response::ServingStatus;
use bollard::health::health_server::{Health, HealthServer};
use bollard::health::{HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse};
use bollard::moby::buildkit::secrets::v1::secrets_server::{Secrets, SecretsServer};
use bollard::moby::buildkit::secrets::v1::{GetSecretRequest, GetSecretResponse};
use bollard::moby::filesync::packet::file_sync_server::FileSyncServer;
use bollard::moby::filesync::v1::auth_server::{Auth, AuthServer};
use bollard::moby::filesync::v1::{
    CredentialsRequest, CredentialsResponse, FetchTokenRequest, FetchTokenResponse, GetTokenAuthorityRequest,
    GetTokenAuthorityResponse, VerifyTokenAuthorityRequest, VerifyTokenAuthorityResponse,
};
use futures_util::Stream;
use hyper_util::rt::TokioExecutor;
use replank_core::fault::Fault;
use tonic::{Request, Response, Status};

use super::filesync::Files;
use super::wire::{Answer, Wire};
use crate::oci::Credentials;

/// What BuildKit is told that it may call.
const METHODS: [&str; 3] = [
    "/moby.filesync.v1.FileSync/DiffCopy",
    "/moby.buildkit.secrets.v1.Secrets/GetSecret",
    "/moby.filesync.v1.Auth/Credentials",
];

/// Everything that a session serves. No Debug output of values.
pub(super) struct Served {
    pub(super) files: Files,
    pub(super) secrets: BTreeMap<String, Vec<u8>>,
    /// By registry host.
    pub(super) credentials: BTreeMap<String, Credentials>,
    /// Secrets that the release's Dockerfile asked for and must not have, or that do not exist.
    pub(super) refused: Arc<Mutex<Vec<String>>>,
}

/// Ends the session when dropped.
pub(super) struct Session {
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Session {
    /// Whether the engine has ended it: told at most `within` later, as this side may not have read that yet.
    pub(super) async fn is_lost(&mut self, within: Duration) -> bool {
        tokio::time::timeout(within, &mut self.task).await.is_ok()
    }
}

/// Opens the session under `id`. `shared` names what the engine may reuse of files that an earlier session sent.
pub(super) async fn open(wire: &Wire, id: &str, shared: &str, served: Served) -> Result<Session, Fault> {
    let mut headers = vec![
        ("connection", "Upgrade"),
        ("upgrade", "h2c"),
        ("x-docker-expose-session-uuid", id),
        ("x-docker-expose-session-name", "replank"),
        ("x-docker-expose-session-sharedkey", shared),
    ];
    headers.extend(METHODS.map(|method| ("x-docker-expose-session-grpc-method", method)));
    let Answer { response, connection } = wire.post("/session", &[], &headers).await?;
    let upgraded = hyper::upgrade::on(response)
        .await
        .map_err(|e| Fault::transient("the Docker engine did not open a build session").because(e))?;

    let Served { files, secrets, credentials, refused } = served;
    let files = FileSyncServer::new(files);
    let secrets = SecretsServer::new(SecretShop { secrets, refused });
    let auth = AuthServer::new(Purse { credentials });
    let health = HealthServer::new(Healthy);
    let task = tokio::spawn(async move {
        let _connection = connection;
        let route = hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
            use tonic::codegen::Service as _;
            let (mut files, mut secrets, mut auth, mut health) =
                (files.clone(), secrets.clone(), auth.clone(), health.clone());
            async move {
                let path = request.uri().path();
                if path.starts_with("/moby.filesync.v1.FileSync/") {
                    files.call(request).await
                } else if path.starts_with("/moby.buildkit.secrets.v1.Secrets/") {
                    secrets.call(request).await
                } else if path.starts_with("/moby.filesync.v1.Auth/") {
                    auth.call(request).await
                } else if path.starts_with("/grpc.health.v1.Health/") {
                    health.call(request).await
                } else {
                    Ok::<_, Infallible>(Status::unimplemented("the build's client does not serve that").into_http())
                }
            }
        });
        let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(upgraded, route);
        if let Err(error) = served.await {
            // The engine closes the session as it pleases once the build is over; a failed build is told elsewhere.
            tracing::debug!(%error, "the build session ended");
        }
    });
    Ok(Session { task })
}

struct SecretShop {
    secrets: BTreeMap<String, Vec<u8>>,
    refused: Arc<Mutex<Vec<String>>>,
}

/// Names of refused secrets that are kept for the message.
const REFUSED_MAX: usize = 10;

#[async_trait]
impl Secrets for SecretShop {
    async fn get_secret(&self, request: Request<GetSecretRequest>) -> Result<Response<GetSecretResponse>, Status> {
        let id = &request.get_ref().id;
        match self.secrets.get(id) {
            Some(value) => Ok(Response::new(GetSecretResponse { data: value.clone() })),
            None => {
                let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
                if refused.len() < REFUSED_MAX {
                    refused.push(id.chars().take(80).collect());
                }
                Err(Status::not_found("the operator's configuration gives this component no such secret"))
            }
        }
    }
}

struct Purse {
    credentials: BTreeMap<String, Credentials>,
}

#[async_trait]
impl Auth for Purse {
    async fn credentials(&self, request: Request<CredentialsRequest>) -> Result<Response<CredentialsResponse>, Status> {
        let found = self.credentials.get(&request.get_ref().host);
        Ok(Response::new(found.map_or_else(CredentialsResponse::default, |found| CredentialsResponse {
            username: found.username.clone(),
            secret: found.password.clone(),
        })))
    }

    // Without these the engine fetches tokens itself, with the credentials above.
    async fn fetch_token(&self, _: Request<FetchTokenRequest>) -> Result<Response<FetchTokenResponse>, Status> {
        Err(Status::unimplemented("tokens are fetched by the engine"))
    }

    async fn get_token_authority(
        &self,
        _: Request<GetTokenAuthorityRequest>,
    ) -> Result<Response<GetTokenAuthorityResponse>, Status> {
        Err(Status::unimplemented("tokens are fetched by the engine"))
    }

    async fn verify_token_authority(
        &self,
        _: Request<VerifyTokenAuthorityRequest>,
    ) -> Result<Response<VerifyTokenAuthorityResponse>, Status> {
        Err(Status::unimplemented("tokens are fetched by the engine"))
    }
}

/// The engine drops a session that does not answer this once a second.
struct Healthy;

#[async_trait]
impl Health for Healthy {
    async fn check(&self, _: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        Ok(Response::new(HealthCheckResponse { status: ServingStatus::Serving.into() }))
    }

    async fn list(&self, _: Request<HealthListRequest>) -> Result<Response<HealthListResponse>, Status> {
        Err(Status::unimplemented("only Check is served"))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("only Check is served"))
    }
}
