//! The exec channel as a way to programs on another container's disk: what its failures mean to the engine.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use replank_core::fault::Fault;
use replank_core::ports::{Log, Stream};
use replank_exec::client::{About, Client, Failed};
use replank_exec::protocol::{self, Outcome, Request, Summary};

/// A sidecar that restarts is back by then; one that is not there at all is no reason to wait for a whole budget.
const UNREACHABLE_FOR: Duration = Duration::from_secs(60);

/// Two of the contract's windows.
const PACE_MAX: Duration = Duration::from_secs(120);

/// One exec server, shared by the source and the builder that drive it.
#[derive(Debug, Clone)]
pub struct Channel {
    client: Arc<Client>,
    unreachable_since: Arc<Mutex<Option<Instant>>>,
}

/// Waits as the server asks, where it limits how often a program may be started. This is no retry: nothing was run, and what
/// takes several programs in a row would never come to its end if each limit sent it back to its beginning.
#[derive(Debug, Default)]
struct Pace {
    waited: Duration,
}

impl Pace {
    async fn waits<T>(&mut self, answer: &Result<T, Failed>) -> bool {
        let Err(Failed::Limited { retry_after: Some(seconds) }) = answer else { return false };
        let pause = Duration::from_secs(*seconds);
        if self.waited + pause > PACE_MAX {
            return false;
        }
        tracing::info!(seconds, "the exec server limits how often a program may be started; waiting");
        tokio::time::sleep(pause).await;
        self.waited += pause;
        true
    }
}

/// How a streamed program ended, and whether there is one at all.
#[derive(Debug)]
pub enum Streamed {
    Ended(Summary),
    /// The server took the request and its answer broke off: what the program does is not known.
    Lost(Fault),
}

impl Channel {
    /// `upstream` is `http://HOST:PORT` or `HOST:PORT`, as `TERMINAL_EXEC_UPSTREAM` has it.
    pub fn new(upstream: &str, token: &str) -> Result<Self, Fault> {
        let client = Client::new(upstream, token).map_err(|why| {
            Fault::permanent("the exec server cannot be asked")
                .advice("set TERMINAL_EXEC_UPSTREAM to http://HOST:PORT")
                .because(why)
        })?;
        Ok(Self { client: Arc::new(client), unreachable_since: Arc::default() })
    }

    /// What the server is and does.
    pub async fn about(&self) -> Result<About, Fault> {
        let answer = self.client.about().await;
        self.sort(answer, "the exec server was asked what it is")
    }

    /// Runs a short program. `doing` begins the fault's text.
    pub async fn run(&self, request: &Request, doing: &str) -> Result<Outcome, Fault> {
        let mut pace = Pace::default();
        loop {
            let answer = self.client.run(request).await;
            if !pace.waits(&answer).await {
                return self.sort(answer, doing);
            }
        }
    }

    /// Runs a long program, each line to `log` as it comes.
    pub async fn stream(&self, request: &Request, doing: &str, log: &dyn Log) -> Result<Streamed, Fault> {
        let mut line = Vec::new();
        let mut each = |stream, text: &str| {
            line.clear();
            line.extend_from_slice(text.as_bytes());
            line.push(b'\n');
            let stream = match stream {
                protocol::Stream::Stdout => Stream::Stdout,
                protocol::Stream::Stderr => Stream::Stderr,
            };
            log.write(stream, &line);
        };
        let mut pace = Pace::default();
        let answer = loop {
            let answer = self.client.stream(request, &mut each).await;
            if !pace.waits(&answer).await {
                break answer;
            }
        };
        let is_lost = matches!(answer, Err(Failed::Broken(_)));
        match self.sort(answer, doing) {
            Ok(summary) => Ok(Streamed::Ended(summary)),
            Err(fault) if is_lost => Ok(Streamed::Lost(fault)),
            Err(fault) => Err(fault),
        }
    }

    fn sort<T>(&self, answer: Result<T, Failed>, doing: &str) -> Result<T, Fault> {
        let mut since = self.unreachable_since.lock().unwrap_or_else(PoisonError::into_inner);
        let why = match answer {
            Ok(answer) => {
                *since = None;
                return Ok(answer);
            }
            Err(why) => why,
        };
        let for_how_long = match &why {
            Failed::Unreachable { .. } => since.get_or_insert_with(Instant::now).elapsed(),
            _ => {
                *since = None;
                Duration::ZERO
            }
        };
        drop(since);
        let what = format!("{doing}, and failed");
        let fault = match &why {
            Failed::Unreachable { .. } if for_how_long < UNREACHABLE_FOR => Fault::transient(what),
            Failed::Unreachable { .. }
            | Failed::Token
            | Failed::Malformed(_)
            | Failed::Denied(_)
            | Failed::TooLarge => Fault::permanent(what),
            // As long as the budget lasts: others use the same server.
            Failed::Busy | Failed::Limited { .. } => Fault::transient(what),
            Failed::Unexpected(status, _) if *status >= 500 => Fault::transient(what),
            Failed::Unexpected(..) => Fault::permanent(what),
            Failed::Broken(_) => Fault::indeterminate(what),
        };
        let advice = match &why {
            Failed::Unreachable { .. } => {
                "start the sidecar that runs the exec server, or correct TERMINAL_EXEC_UPSTREAM"
            }
            Failed::Token => "give this controller and the exec server the same EXEC_TOKEN",
            Failed::Denied(_) => {
                "let the exec server's environment (UPGRADE_GIT_REMOTE, PLATFORM_ACR_NAME, EXEC_CLONE_ROOT, \
                 EXEC_ALLOWED_BINARIES) name the same as this controller's"
            }
            Failed::Busy => "it goes on when a program has ended; EXEC_MAX_CONCURRENCY is how many may run at once",
            Failed::Limited { .. } => {
                "it goes on when the server's window is over; EXEC_RATE_LIMIT_PER_WINDOW is the limit"
            }
            Failed::Malformed(_) | Failed::TooLarge | Failed::Unexpected(..) => {
                "check that TERMINAL_EXEC_UPSTREAM leads to an exec server"
            }
            Failed::Broken(_) => "look at the exec server's log: it may have been restarted",
        };
        Err(fault.advice(advice).because(why))
    }
}
