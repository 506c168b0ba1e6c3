//! Certificates from files, taken anew when the files change.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::Context as _;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;

use super::persist::read_small;
use super::proxy_api::{Protocol, TlsFiles};

/// One listener's certificate, replaced while connections come in.
#[derive(Debug)]
pub(crate) struct Certificate {
    files: (PathBuf, PathBuf),
    provider: Arc<CryptoProvider>,
    /// What the files held when they were last looked at, good or bad, and the last good key.
    seen: RwLock<(Vec<u8>, Vec<u8>)>,
    current: RwLock<Arc<CertifiedKey>>,
}

impl Certificate {
    pub(crate) fn load(files: &TlsFiles) -> anyhow::Result<Arc<Self>> {
        let files = (PathBuf::from(&files.certificate), PathBuf::from(&files.key));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let pem = read(&files)?;
        let key = parse(&provider, &pem, &files)?;
        Ok(Arc::new(Self { files, provider, seen: RwLock::new(pem), current: RwLock::new(Arc::new(key)) }))
    }

    /// Looks at the files; what is unreadable or does not fit together leaves the old certificate in force. Contents are compared
    /// rather than times, since a mounted secret is a link that moves.
    pub(crate) fn refresh(&self) {
        let pem = match read(&self.files) {
            Ok(pem) => pem,
            Err(error) => return tracing::warn!(error = format!("{error:#}"), "the old certificate stays in use"),
        };
        let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
        if *seen == pem {
            return;
        }
        match parse(&self.provider, &pem, &self.files) {
            Ok(key) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(key);
                tracing::info!(certificate = %self.files.0.display(), "a new certificate is in use");
            }
            // Said once per content: files are often replaced one after the other.
            Err(error) => tracing::warn!(error = format!("{error:#}"), "the old certificate stays in use"),
        }
        *seen = pem;
    }

    /// A server's TLS settings that always use the certificate in force.
    pub(crate) fn server(self: &Arc<Self>, protocol: Protocol) -> anyhow::Result<Arc<rustls::ServerConfig>> {
        let mut config = rustls::ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .context("TLS cannot be set up")?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = match protocol {
            Protocol::Http => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            Protocol::Tcp => vec![],
        };
        Ok(Arc::new(config))
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

fn read(files: &(PathBuf, PathBuf)) -> anyhow::Result<(Vec<u8>, Vec<u8>)> {
    let one = |path: &Path| read_small(path).with_context(|| format!("{} cannot be read", path.display()));
    Ok((one(&files.0)?, one(&files.1)?))
}

fn parse(
    provider: &CryptoProvider,
    pem: &(Vec<u8>, Vec<u8>),
    files: &(PathBuf, PathBuf),
) -> anyhow::Result<CertifiedKey> {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&pem.0)
        .collect::<Result<_, _>>()
        .with_context(|| format!("{} is not a PEM certificate chain", files.0.display()))?;
    anyhow::ensure!(!chain.is_empty(), "{} holds no certificate", files.0.display());
    let key = PrivateKeyDer::from_pem_slice(&pem.1)
        .with_context(|| format!("{} holds no PEM private key", files.1.display()))?;
    CertifiedKey::from_der(chain, key, provider)
        .with_context(|| format!("{} and {} do not fit together", files.0.display(), files.1.display()))
}
