//! A client's connection: whether the client is still there while its program runs, and whether it takes what it is sent.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep};

/// A client that takes nothing for so long is given up, or else a few of them would take every connection there is. While its
/// program runs, only the program's own time counts.
const STALL_LIMIT: Duration = Duration::from_secs(20);

/// What a request knows of the connection that it came by.
#[derive(Debug, Clone)]
pub struct Client {
    gone: watch::Receiver<bool>,
    running: Arc<AtomicUsize>,
}

/// A program runs for the client: as long as this is held, the client may take its time.
#[derive(Debug)]
pub struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Client {
    /// Ready when the client has closed its end, or the connection is lost.
    pub async fn gone(&mut self) {
        // Who watched has ended with the connection.
        let _over = self.gone.wait_for(|gone| *gone).await;
    }

    #[must_use]
    pub fn running(&self) -> Running {
        self.running.fetch_add(1, Ordering::Relaxed);
        Running(self.running.clone())
    }
}

/// What HTTP is spoken over.
#[derive(Debug)]
pub struct Link {
    stream: TcpStream,
    stalled: Option<Pin<Box<Sleep>>>,
    running: Arc<AtomicUsize>,
}

/// The connection, what its requests know of it, and a watch that has to run beside it; it never ends.
///
/// # Errors
/// When there are no file descriptors left.
pub fn open(stream: TcpStream) -> io::Result<(Link, Client, impl Future<Output = ()> + Send)> {
    let stream = stream.into_std()?;
    // HTTP reads no further than the request that it is at, so it does not see the end of a connection behind bytes that the
    // client has sent beyond. A second descriptor is told of the end whatever stands before it.
    let twin = TcpStream::from_std(stream.try_clone()?)?;
    let stream = TcpStream::from_std(stream)?;
    let (tell, gone) = watch::channel(false);
    let running = Arc::new(AtomicUsize::new(0));
    let watch = async move {
        // Failing means that the runtime ends, and everything with it.
        while let Ok(ready) = twin.ready(Interest::READABLE).await {
            if ready.is_read_closed() {
                break;
            }
            // Nothing is read here; this makes it wait for the next news.
            let _none = twin.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        }
        // Nobody may be listening just now.
        tell.send_replace(true);
        std::future::pending().await
    };
    Ok((Link { stream, stalled: None, running: running.clone() }, Client { gone, running }, watch))
}

impl Link {
    /// Says whether a write may wait on, and fails it when it has waited for too long.
    fn patience<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(STALL_LIMIT)));
        loop {
            ready!(stalled.as_mut().poll(cx));
            if self.running.load(Ordering::Relaxed) == 0 {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            stalled.as_mut().reset(Instant::now() + STALL_LIMIT);
        }
    }
}

impl AsyncRead for Link {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Link {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.patience(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, pieces);
        self.patience(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
