//! The center's API, served at a site for the people there (`godwit ap --api`).
//!
//! Each request goes over the site's link to its center, with the caller's own token; the site has
//! no rights of its own. TLS ends here, though: whoever has the site's host can read the tokens and
//! what is asked by them. So the center hears no operator by way of a site, and makes no tokens
//! there. What the site adds are limits: so many requests at once, of all and of one address, so
//! many wrong tokens from one address, and so long for taking an answer's next piece. Streams of
//! events and long answers come through piece by piece; screens and consoles, which need a connection
//! to the center, do not.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use axum::body::{Body, HttpBody as _};
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use godwit_site::{API_AT_ONCE, ApiRequest, ask_center};
use godwit_transfer::Link;
use godwit_types::{Fault, Name};
use tokio::sync::{Semaphore, watch};

use super::TlsFiles;
use super::by_site::{HEADERS, write};
use crate::api::HttpFault;
use crate::api::strikes::{self, Strikes};

/// Wrong tokens that are passed on from one address in a minute.
const WRONG_TOKENS: u32 = 20;

/// Requests of one address at once; fewer than wrong tokens, as each counts as one until the center
/// has answered.
const AT_ONCE_OF_ONE: usize = 16;

/// How a site serves the center's API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrontConfig {
    /// Where it listens; port 0 picks one.
    pub listen: SocketAddr,
    /// The operator's own certificate for it; a self-signed one is made when left out.
    pub tls: Option<TlsFiles>,
    /// Where the certificate is written for clients, too.
    pub ca_file: Option<PathBuf>,
}

/// What the handler shares.
struct Front {
    site: Name,
    /// The link to the center, while there is one.
    center: watch::Receiver<Option<Link>>,
    room: Arc<Semaphore>,
    /// Requests at once by the address they came from.
    callers: Arc<Mutex<HashMap<IpAddr, usize>>>,
    wrong: Strikes<IpAddr>,
}

/// What the site serves.
pub(super) fn router(site: Name, center: watch::Receiver<Option<Link>>) -> axum::Router {
    routes(Arc::new(Front::new(site, center)))
}

fn routes(front: Arc<Front>) -> axum::Router {
    axum::Router::new().fallback(forward).with_state(front)
}

async fn forward(
    State(front): State<Arc<Front>>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    request: Request,
) -> Response {
    let from = one_caller(from.ip());
    front.judge(from, request).await.unwrap_or_else(|f| HttpFault(f).into_response())
}

/// A token that is counted as a wrong one until the center has said what it is.
struct Doubted<'a> {
    wrong: &'a Strikes<IpAddr>,
    from: IpAddr,
    counted: Instant,
}

impl Drop for Doubted<'_> {
    fn drop(&mut self) {
        self.wrong.take_back(&self.from, self.counted);
    }
}

/// A place among the requests of one address.
struct CallersPlace {
    callers: Arc<Mutex<HashMap<IpAddr, usize>>>,
    from: IpAddr,
}

impl CallersPlace {
    /// None while that address has as many as it may have.
    fn take(callers: &Arc<Mutex<HashMap<IpAddr, usize>>>, from: IpAddr) -> Option<Self> {
        let mut all = callers.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(from).or_insert(0);
        if *count >= AT_ONCE_OF_ONE {
            return None;
        }
        *count += 1;
        drop(all);
        Some(Self { callers: callers.clone(), from })
    }
}

impl Drop for CallersPlace {
    fn drop(&mut self) {
        let mut all = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut count) = all.entry(self.from) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// Where a caller is, as far as that can be chosen by whom one is: of IPv6 the first half.
fn one_caller(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
        ip => ip,
    }
}

impl Front {
    fn new(site: Name, center: watch::Receiver<Option<Link>>) -> Self {
        let room = Arc::new(Semaphore::new(API_AT_ONCE));
        let (callers, wrong) = (Arc::default(), Strikes::new(WRONG_TOKENS));
        Self { site, center, room, callers, wrong }
    }

    /// Asks the center, and counts the tokens that it does not know.
    async fn judge(&self, from: IpAddr, request: Request) -> Result<Response, Fault> {
        let shown = request.headers().contains_key(header::AUTHORIZATION);
        let doubted = shown.then(|| self.wrong.reserve(&from, Instant::now())).transpose();
        let doubted = doubted.map_err(|left| strikes::too_many("your address", left))?;
        let doubted = doubted.map(|counted| Doubted { wrong: &self.wrong, from, counted });
        let answer = self.ask(from, request).await?;
        if answer.status() == StatusCode::UNAUTHORIZED {
            std::mem::forget(doubted);
        }
        Ok(answer)
    }

    async fn ask(&self, from: IpAddr, request: Request) -> Result<Response, Fault> {
        let site = &self.site;
        if request.headers().contains_key(header::UPGRADE) || request.method() == Method::CONNECT {
            let words = format!("screens and consoles do not come through site '{site}'");
            return Err(Fault::invalid(words).hint("ask the center itself for them: --api URL"));
        }
        let of_one = CallersPlace::take(&self.callers, from).ok_or_else(|| {
            let words = format!("your address has {AT_ONCE_OF_ONE} requests at site '{site}'");
            Fault::unavailable(words).hint("come back when one of them has ended")
        })?;
        let place = self.room.clone().try_acquire_owned().map_err(|_| {
            Fault::unavailable(format!("site '{site}' has {API_AT_ONCE} requests at its center"))
                .hint("come back later")
        })?;
        let link = self.center.borrow().clone().ok_or_else(|| {
            Fault::unavailable(format!("site '{site}' does not reach its center now"))
                .hint("it goes on trying, and its machines run on; come back later")
        })?;
        let (head, body) = request.into_parts();
        let named = |name| head.headers.get_all(name).iter().map(move |v| (name, v));
        let readable = HEADERS.iter().flat_map(named).map(|(name, value)| {
            let bad = |_| Fault::invalid(format!("the header {name} is not plain text"));
            value.to_str().map(|v| (name.to_string(), v.to_owned())).map_err(bad)
        });
        let asked = ApiRequest {
            method: head.method.to_string(),
            target: head.uri.path_and_query().map_or("/", |t| t.as_str()).to_owned(),
            headers: readable.collect::<Result<_, _>>()?,
            length: body.size_hint().exact(),
        };
        let cut = |e: axum::Error| Fault::invalid(godwit_types::chain(&e));
        let body = body.into_data_stream().map(move |piece| piece.map_err(cut));
        let (answer, pieces) = ask_center(&link, asked, body, (of_one, place)).await?;
        let pieces = pieces.map(|piece| piece.map_err(|f| std::io::Error::other(f.message)));
        write(answer, Body::from_stream(pieces))
    }
}

#[cfg(test)]
mod tests;
