//! The center's API, served at a site for the people there (`godwit ap --api`).
//!
//! Each request goes over the site's link to its center, with the caller's own token; the site
//! reads neither and has no rights of its own. What it adds are limits: so many requests at once,
//! and so many wrong tokens from one address. Streams of events and long answers come through
//! piece by piece; screens and consoles, which need a connection to the center, do not.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
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
    wrong: Strikes<IpAddr>,
}

/// What the site serves.
pub(super) fn router(site: Name, center: watch::Receiver<Option<Link>>) -> axum::Router {
    let room = Arc::new(Semaphore::new(API_AT_ONCE));
    let front = Front { site, center, room, wrong: Strikes::new(WRONG_TOKENS) };
    axum::Router::new().fallback(forward).with_state(Arc::new(front))
}

async fn forward(
    State(front): State<Arc<Front>>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    request: Request,
) -> Response {
    let from = one_caller(from.ip());
    let shown = request.headers().contains_key(header::AUTHORIZATION);
    match front.ask(from, request).await {
        Ok(answer) => {
            if shown && answer.status() == StatusCode::UNAUTHORIZED {
                front.wrong.add(from, Instant::now());
            }
            answer
        }
        Err(f) => HttpFault(f).into_response(),
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
    async fn ask(&self, from: IpAddr, request: Request) -> Result<Response, Fault> {
        let site = &self.site;
        if request.headers().contains_key(header::UPGRADE) || request.method() == Method::CONNECT {
            let words = format!("screens and consoles do not come through site '{site}'");
            return Err(Fault::invalid(words).hint("ask the center itself for them: --api URL"));
        }
        if let Some(left) = self.wrong.shut(&from, Instant::now()) {
            return Err(strikes::too_many("your address", left));
        }
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
        };
        let cut = |e: axum::Error| Fault::invalid(godwit_types::chain(&e));
        let body = body.into_data_stream().map(move |piece| piece.map_err(cut));
        let (answer, pieces) = ask_center(&link, asked, body).await?;
        let pieces = pieces.map(move |piece| {
            let _while_read = &place;
            piece.map_err(|f| std::io::Error::other(f.message))
        });
        write(answer, Body::from_stream(pieces))
    }
}

#[cfg(test)]
mod tests;
