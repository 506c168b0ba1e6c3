//! One public port: bound on all addresses, with a bound on its connections.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::connect::tune;
use super::headers::Client;
use super::http::{self, Http};
use super::limits::{ACCEPT_PAUSE, BACKLOG};
use super::proxy_api::{Listener, Protocol};
use super::server::Shared;
use super::tcp;
use super::tls::Certificate;

/// Binds a port on IPv6 and IPv4, or on IPv4 alone where the machine has no IPv6.
pub(crate) fn bind(port: u16) -> io::Result<TcpListener> {
    let dual = || {
        let socket = TcpSocket::new_v6()?;
        rustix::net::sockopt::set_ipv6_v6only(&socket, false)?;
        listen(socket, (Ipv6Addr::UNSPECIFIED, port).into())
    };
    dual().or_else(|error| {
        if error.kind() == io::ErrorKind::AddrInUse || error.kind() == io::ErrorKind::PermissionDenied {
            return Err(error);
        }
        listen(TcpSocket::new_v4()?, (Ipv4Addr::UNSPECIFIED, port).into())
    })
}

fn listen(socket: TcpSocket, address: SocketAddr) -> io::Result<TcpListener> {
    // A proxy that restarts must get its port back while old connections linger in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// A public port and what it speaks.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) name: Arc<str>,
    pub(crate) protocol: Protocol,
    pub(crate) certificate: Option<Arc<Certificate>>,
    acceptor: Option<Acceptor>,
}

struct Acceptor(TlsAcceptor);

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Acceptor")
    }
}

impl Door {
    pub(crate) fn new(name: &str, listener: &Listener) -> anyhow::Result<Self> {
        let certificate = listener.tls.as_ref().map(Certificate::load).transpose()?;
        let config = certificate.as_ref().map(|certificate| certificate.server(listener.protocol)).transpose()?;
        let acceptor = config.map(|config| Acceptor(TlsAcceptor::from(config)));
        Ok(Self { name: name.into(), protocol: listener.protocol, certificate, acceptor })
    }
}

/// Takes connections until the proxy stops.
pub(crate) async fn accept(shared: Arc<Shared>, door: Arc<Door>, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(shared.limits.connections));
    loop {
        let next = async {
            // A place first: beyond the bound, connections wait in the kernel's queue.
            let place = Arc::clone(&places).acquire_owned().await.ok()?;
            match listener.accept().await {
                Ok((stream, peer)) => Some((place, stream, peer)),
                Err(error) => {
                    tracing::warn!(%error, listener = &*door.name, "a connection could not be accepted");
                    sleep(ACCEPT_PAUSE).await;
                    None
                }
            }
        };
        let accepted = tokio::select! {
            accepted = next => accepted,
            () = shared.stopping.cancelled() => return,
        };
        let Some((place, stream, peer)) = accepted else { continue };
        let (shared, door) = (Arc::clone(&shared), Arc::clone(&door));
        shared.tasks.clone().spawn(async move {
            let _place = place;
            tune(&stream);
            serve(&shared, &door, stream, peer).await;
        });
    }
}

async fn serve(shared: &Arc<Shared>, door: &Door, stream: TcpStream, peer: SocketAddr) {
    let client = Client::new(peer.ip(), door.acceptor.is_some(), &shared.trusted);
    let Some(Acceptor(acceptor)) = &door.acceptor else {
        match door.protocol {
            Protocol::Tcp => tcp::serve(shared, &door.name, stream).await,
            Protocol::Http => {
                let sniffed = tokio::select! {
                    sniffed = http::sniff(&stream, shared.limits.header_read) => sniffed,
                    () = shared.stopping.cancelled() => None,
                };
                if let Some(http) = sniffed {
                    http::serve(shared, &door.name, client, stream, http).await;
                }
            }
        }
        return;
    };
    let stream = match timeout(shared.limits.handshake, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, listener = &*door.name, "a TLS handshake failed"),
        Err(_) => return,
    };
    match door.protocol {
        Protocol::Tcp => tcp::serve(shared, &door.name, stream).await,
        Protocol::Http => {
            let two = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            http::serve(shared, &door.name, client, stream, if two { Http::Two } else { Http::One }).await;
        }
    }
}
