//! Requests to the center's API that sites hand over: answered by the very router that the center
//! serves, so that what holds there holds here.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use async_trait::async_trait;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, Uri, header};
use futures::StreamExt;
use godwit_site::{ApiAnswer, ApiRequest, CenterHost, Pieces};
use godwit_transfer::Peer;
use godwit_types::{Code, Fault};
use hyper::body::{Frame, SizeHint};
use tower::ServiceExt as _;

use crate::api::{By, TENANT_HEADER};

/// The headers of a request that cross the link; `host`, cookies and whatever a proxy adds do not.
pub(super) static HEADERS: [HeaderName; 5] = [
    header::AUTHORIZATION,
    header::CONTENT_TYPE,
    header::ACCEPT,
    HeaderName::from_static("last-event-id"),
    HeaderName::from_static(TENANT_HEADER),
];

/// Headers of an answer that are about a connection, not about it.
static OF_CONNECTION: [HeaderName; 4] =
    [header::CONNECTION, header::TRANSFER_ENCODING, header::UPGRADE, header::TRAILER];

/// What the center does for its sites.
pub(super) struct BySite {
    /// What the center serves.
    pub(super) router: axum::Router,
}

#[async_trait]
impl CenterHost for BySite {
    async fn api(
        &self,
        by: &Peer,
        request: ApiRequest,
        body: Pieces,
    ) -> Result<(ApiAnswer, Pieces), Fault> {
        let request = read(request, by, body)?;
        let answer = self.router.clone().oneshot(request).await.unwrap_or_else(|e| match e {});
        let (head, body) = answer.into_parts();
        let headers = head.headers.iter().filter(|(name, _)| !OF_CONNECTION.contains(name));
        let header = |(name, value): (&HeaderName, &HeaderValue)| {
            value.to_str().ok().map(|v| (name.to_string(), v.to_owned()))
        };
        let answer = ApiAnswer {
            status: head.status.as_u16(),
            headers: headers.filter_map(header).collect(),
        };
        let cut = |e: axum::Error| Fault::internal(godwit_types::chain(&e));
        Ok((answer, body.into_data_stream().map(move |piece| piece.map_err(cut)).boxed()))
    }
}

/// A body whose length was said before it comes: what is decided by that holds.
struct Announced {
    body: Body,
    /// Bytes that have not come yet.
    left: u64,
}

impl HttpBody for Announced {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        let me = &mut *self;
        let Poll::Ready(piece) = Pin::new(&mut me.body).poll_frame(cx) else {
            return Poll::Pending;
        };
        let piece = match piece {
            Some(Ok(piece)) => {
                let len = piece.data_ref().map_or(0, Bytes::len) as u64;
                match me.left.checked_sub(len) {
                    Some(left) => me.left = left,
                    None => return Poll::Ready(Some(Err(other_length("longer")))),
                }
                Some(Ok(piece))
            }
            Some(Err(e)) => Some(Err(io::Error::other(e))),
            // Once.
            None if std::mem::take(&mut me.left) > 0 => Some(Err(other_length("shorter"))),
            None => None,
        };
        Poll::Ready(piece)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

fn other_length(how: &str) -> io::Error {
    let words = format!("the body of the request is {how} than was announced");
    io::Error::new(io::ErrorKind::InvalidData, words)
}

/// The request as it is served.
fn read(request: ApiRequest, by: &Peer, body: Pieces) -> Result<Request, Fault> {
    let bad = |what: &str| Fault::invalid(format!("a request with {what} that is none"));
    let uri: Uri = request.target.parse().map_err(|_| bad("a path"))?;
    let method: Method = request.method.parse().map_err(|_| bad("a method"))?;
    if uri.scheme().is_some() || uri.authority().is_some() || method == Method::CONNECT {
        return Err(Fault::invalid("a request for another server"));
    }
    let body = body.map(|piece| piece.map_err(|f| std::io::Error::other(f.message)));
    let body = Body::from_stream(body);
    let body = match request.length {
        Some(left) => Body::new(Announced { body, left }),
        None => body,
    };
    let mut made = Request::new(body);
    (*made.uri_mut(), *made.method_mut()) = (uri, method);
    for (name, value) in request.headers {
        let name: HeaderName = name.parse().map_err(|_| bad("a header"))?;
        // A site that sends others is none of ours: what they would do is not looked into.
        if HEADERS.contains(&name) {
            let value: HeaderValue = value.parse().map_err(|_| bad("a header"))?;
            made.headers_mut().append(name, value);
        }
    }
    made.extensions_mut().insert(By(by.name.clone()));
    Ok(made)
}

/// The answer as HTTP's.
pub(super) fn write(answer: ApiAnswer, body: Body) -> Result<axum::response::Response, Fault> {
    let bad = || Fault::new(Code::Damaged, "an answer of the center that is none");
    let mut made = axum::response::Response::new(body);
    *made.status_mut() = answer.status.try_into().map_err(|_| bad())?;
    for (name, value) in answer.headers {
        let name: HeaderName = name.parse().map_err(|_| bad())?;
        let value: HeaderValue = value.parse().map_err(|_| bad())?;
        made.headers_mut().append(name, value);
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_has_the_announced_length() {
        for (announced, comes, whole) in
            [(5, "12345", true), (4, "12345", false), (6, "12345", false)]
        {
            let halves = [Ok::<_, io::Error>(&comes[..2]), Ok(&comes[2..])];
            let halves = halves.map(|piece| piece.map(|text| Bytes::from(text.to_owned())));
            let body = Body::from_stream(futures::stream::iter(halves));
            let body = Body::new(Announced { body, left: announced });
            assert_eq!(body.size_hint().exact(), Some(announced));
            let all = axum::body::to_bytes(body, 100).await;
            assert_eq!(all.is_ok(), whole, "{announced}: {all:?}");
        }
    }
}
