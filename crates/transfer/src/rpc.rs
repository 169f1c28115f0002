//! Calls between sites: one lane a call, typed on both sides, bounded in size and time.
//!
//! ```text
//!  caller                                      server
//!   | Call{method, time left, body} ------------> |
//!   | <------------- Answer: Done(body) | Failed{code, text}
//! ```
//! A call that was begun runs to its end at the server even when the caller gives up: handlers
//! change state, and half a change helps nobody. Jobs that take long are operations, which a call
//! starts and others watch.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use godwit_types::{Code, CodedError};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;

use crate::keys::Peer;
use crate::link::{Lane, LaneError, Link};
use crate::wire::{LaneKind, MAX_FRAME, Priority, WireError, decode, decode_open, encode};

/// The longest name of a method, in bytes.
pub const MAX_METHOD: usize = 64;
/// The longest text of a failure, in bytes.
const MAX_TEXT: usize = 4096;
/// How many calls of one link are worked on at once.
const AT_ONCE: usize = 64;
/// How long an answer may take to be delivered.
const DELIVERY: Duration = Duration::from_secs(60);

/// A call as it crosses the link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// Which method.
    pub method: String,
    /// How long the caller will wait, in milliseconds.
    pub patience_ms: u32,
    /// The request, postcard.
    pub body: Bytes,
}

impl Call {
    /// Decodes and checks a call.
    ///
    /// # Errors
    /// [`WireError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let call: Self = decode_open("call", bytes)?;
        if call.method.is_empty() || call.method.len() > MAX_METHOD {
            return Err(WireError::Bounds { what: "call", why: "its method has 1 to 64 bytes" });
        }
        Ok(call)
    }
}

/// An answer as it crosses the link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The response, postcard.
    Done(Bytes),
    /// The method failed.
    Failed(Fault),
}

/// A failure as it crosses a link: its class and its words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The class.
    pub code: Code,
    /// The whole chain of causes in words.
    pub text: String,
}

impl Fault {
    /// A failure in plain words.
    #[must_use]
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        let mut text = text.into();
        if text.len() > MAX_TEXT {
            let end = (0..=MAX_TEXT).rev().find(|i| text.is_char_boundary(*i)).unwrap_or(0);
            text.truncate(end);
        }
        Self { code, text }
    }
}

impl<E: CodedError> From<E> for Fault {
    fn from(error: E) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(e) = cause {
            text.push_str(": ");
            text.push_str(&e.to_string());
            cause = e.source();
        }
        Self::new(error.code(), text)
    }
}

/// Why a call gave no response.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RpcError {
    /// The peer did the call and failed.
    #[error("{peer} failed at '{method}': {}", .fault.text)]
    Failed {
        /// The site that was called.
        peer: godwit_types::Name,
        /// The method.
        method: String,
        /// What it said.
        fault: Fault,
    },
    /// The call did not get through, or its answer did not; it is unknown whether it was done.
    #[error("the call of '{method}' at {peer} was cut off")]
    Lane {
        /// The site that was called.
        peer: godwit_types::Name,
        /// The method.
        method: String,
        /// How.
        #[source]
        source: LaneError,
    },
    /// No answer in time; it is unknown whether it was done.
    #[error("{peer} did not answer '{method}' within {} ms", .after.as_millis())]
    TimedOut {
        /// The site that was called.
        peer: godwit_types::Name,
        /// The method.
        method: String,
        /// The time that was allowed.
        after: Duration,
    },
}

impl CodedError for RpcError {
    fn code(&self) -> Code {
        match self {
            Self::Failed { fault, .. } => fault.code,
            Self::Lane { source, .. } => source.code(),
            Self::TimedOut { .. } => Code::TimedOut,
        }
    }
}

impl Link {
    /// Calls a method of the peer and waits for its response, at most `patience`. Request and
    /// response have at most 1 MiB each.
    ///
    /// # Errors
    /// [`RpcError`]; its code is the peer's own where the peer failed.
    pub async fn call<Q, A>(
        &self,
        method: &str,
        request: &Q,
        patience: Duration,
    ) -> Result<A, RpcError>
    where
        Q: Serialize + Sync,
        A: DeserializeOwned,
    {
        let cut = |source: LaneError| RpcError::Lane {
            peer: self.peer().name.clone(),
            method: method.to_owned(),
            source,
        };
        let body = encode("request", request).map_err(|e| cut(e.into()))?;
        let exchange = async {
            let mut lane = self.open(LaneKind::Rpc, Priority::Control).await?;
            let call = Call {
                method: method.to_owned(),
                patience_ms: u32::try_from(patience.as_millis()).unwrap_or(u32::MAX),
                body,
            };
            lane.send_bytes(encode("call", &call)?).await?;
            let answer = lane.recv().await?.ok_or(LaneError::Ended)?;
            Ok::<Answer, LaneError>(decode_open("answer", &answer)?)
        };
        match tokio::time::timeout(patience, exchange).await {
            Ok(Ok(Answer::Done(body))) => {
                decode_open("response", &body).map_err(|e| cut(LaneError::from(e)))
            }
            Ok(Ok(Answer::Failed(fault))) => Err(RpcError::Failed {
                peer: self.peer().name.clone(),
                method: method.to_owned(),
                fault: Fault::new(fault.code, fault.text),
            }),
            Ok(Err(source)) => Err(cut(source)),
            Err(_) => Err(RpcError::TimedOut {
                peer: self.peer().name.clone(),
                method: method.to_owned(),
                after: patience,
            }),
        }
    }

    /// Answers the peer's calls with `router` until the link is closed. Run it in a task of its
    /// own, once a link; calls that nobody serves wait.
    pub async fn serve(&self, router: Arc<Router>) {
        let room = Arc::new(Semaphore::new(AT_ONCE));
        loop {
            let Ok(permit) = room.clone().acquire_owned().await else { return };
            let Some(lane) = self.accept_call().await else { return };
            let (router, peer) = (Arc::clone(&router), self.peer().clone());
            tokio::spawn(async move {
                if let Err(error) = answer(lane, &router, peer).await {
                    tracing::debug!(%error, "an answer did not get through");
                }
                drop(permit);
            });
        }
    }
}

async fn answer(mut lane: Lane, router: &Router, peer: Peer) -> Result<(), LaneError> {
    let call = tokio::time::timeout(DELIVERY, lane.recv()).await;
    let Ok(call) = call else { return Ok(()) };
    let call = Call::decode(&call?.ok_or(LaneError::Ended)?)?;
    let outcome = router.handle(peer, &call.method, call.body).await;
    let answer = match outcome {
        Ok(body) if body.len() > MAX_FRAME - 64 => Answer::Failed(Fault::new(
            Code::Internal,
            format!("the response to '{}' is over 1 MiB", call.method),
        )),
        Ok(body) => Answer::Done(body),
        Err(fault) => Answer::Failed(fault),
    };
    let deliver = async {
        lane.send_bytes(encode("answer", &answer)?).await?;
        lane.finish().await
    };
    tokio::time::timeout(DELIVERY, deliver).await.unwrap_or(Ok(()))
}

type HandlerFuture = Pin<Box<dyn Future<Output = Result<Bytes, Fault>> + Send>>;
type Handler = Box<dyn Fn(Peer, Bytes) -> HandlerFuture + Send + Sync>;

/// The methods that a site answers.
#[derive(Default)]
pub struct Router {
    methods: HashMap<String, Handler>,
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.methods.keys()).finish()
    }
}

impl Router {
    /// Answers nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a method: a function from caller and request to response. Whether this caller may
    /// call it is for the function to say.
    #[must_use]
    pub fn on<Q, A, F, R>(mut self, method: &str, handler: F) -> Self
    where
        Q: DeserializeOwned + Send + 'static,
        A: Serialize + Send + 'static,
        F: Fn(Peer, Q) -> R + Send + Sync + 'static,
        R: Future<Output = Result<A, Fault>> + Send + 'static,
    {
        let handler: Handler = Box::new(move |peer, body: Bytes| {
            let request = decode::<Q>("request", &body);
            match request {
                Ok(request) => {
                    let work = handler(peer, request);
                    Box::pin(async move {
                        let response = work.await?;
                        encode("response", &response).map_err(Fault::from)
                    })
                }
                Err(error) => {
                    let mut fault = Fault::from(error);
                    fault.code = Code::Invalid;
                    Box::pin(std::future::ready(Err(fault)))
                }
            }
        });
        self.methods.insert(method.to_owned(), handler);
        self
    }

    /// Answers one call.
    ///
    /// # Errors
    /// The handler's [`Fault`]; `not-found` for an unknown method; `invalid` for a request that
    /// does not decode.
    pub async fn handle(&self, peer: Peer, method: &str, body: Bytes) -> Result<Bytes, Fault> {
        match self.methods.get(method) {
            Some(handler) => handler(peer, body).await,
            None => {
                let shown: String = method.escape_debug().take(MAX_METHOD).collect();
                Err(Fault::new(Code::NotFound, format!("this site has no method '{shown}'")))
            }
        }
    }
}
