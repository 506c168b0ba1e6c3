//! Bytes in both directions: TCP listeners, upgraded connections, control tunnels.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};

use super::server::Shared;

/// Copies until both directions have ended. A direction that ends is closed towards the other side, the other goes on.
pub(crate) async fn join(mut one: impl AsyncRead + AsyncWrite + Unpin, mut other: impl AsyncRead + AsyncWrite + Unpin) {
    if let Err(error) = tokio::io::copy_bidirectional(&mut one, &mut other).await {
        tracing::debug!(%error, "a tunnel ended");
    }
}

/// One client of a TCP listener. It stays with the side that it began with until either end closes.
pub(crate) async fn serve(shared: &Arc<Shared>, listener: &str, client: impl AsyncRead + AsyncWrite + Unpin) {
    let Some((backend, _open)) = shared.table.choose(listener) else {
        tracing::warn!(listener, "a connection was closed: nothing is deployed here");
        return;
    };
    match shared.connector.patiently(&backend).await {
        Ok(stream) => join(client, stream).await,
        Err(error) => tracing::warn!(listener, %error, "a connection was closed"),
    }
}
