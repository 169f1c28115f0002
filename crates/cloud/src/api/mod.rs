//! The HTTPS API: JSON over axum, described by OpenAPI ([`openapi`]).
//!
//! Every request but `/healthz` carries `Authorization: Bearer TOKEN`, of the operator or of a user,
//! and is made by that [`Principal`]; what another tenant has is not there for it. An operator acts in
//! the tenant that the header [`TENANT_HEADER`] names. Bodies are at most [`MAX_BODY`] bytes, but for
//! a guest's program and its input ([`MAX_INPUT`]); only an import of a substrate is streamed, to its
//! own limit. Every error is a [`Fault`] in JSON with the status of its class. Fields and parameters
//! that are not known are refused. What takes long answers 202 with the operation that does it.

mod events;
mod exec;
mod images;
mod meta;
mod networks;
mod operations;
mod people;
mod routes;
mod shares;
mod sites;
pub(crate) mod strikes;
mod substrates;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod tests_access;
#[cfg(test)]
mod tests_previous;
mod vms;

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, BodyDataStream, HttpBody as _};
use axum::extract::{FromRequest, FromRequestParts, Request, State};
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use godwit_transfer::Revocations;
use godwit_transfer::keys::TokenInfo;
use godwit_types::{Code, Fault, Name, SiteKind, UnixMs};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use utoipa::{IntoParams, OpenApi, ToSchema};

use crate::access::Principal;
use crate::controller::{Accepted, Controller, Mode};

pub use events::{EventFilter, FeedEvent, MAX_STREAMS, RESET, REVISION_HEADER, Reset};
pub use exec::{Encoding, ExecReply, ExecRequest, MAX_INPUT};
pub use meta::Health;
pub use routes::Routes;
pub use sites::{NewToken, Token, TokenText, TokenUse};
pub use substrates::Grant;
pub use vms::{TypeText, VmFilter};

/// The header by which an operator names the tenant that it acts in.
pub const TENANT_HEADER: &str = "godwit-tenant";

/// Wrong tokens that are heard by one site in a minute.
const WRONG_BY_SITE: u32 = 60;

/// The longest body of a request, in bytes.
pub const MAX_BODY: usize = 1 << 20;

/// The longest substrate that may be imported, in bytes.
pub const MAX_IMPORT: u64 = 64 << 30;

/// How long a body that is read whole may take to come.
const BODY_WITHIN: Duration = Duration::from_secs(30);

/// Bytes that are read and dropped after a body was refused: whoever is still sending would
/// otherwise lose the answer to a connection that breaks.
const DROPPED: usize = 64 << 20;

/// How long they may take to come.
const DROPPED_WITHIN: Duration = Duration::from_secs(5);

/// Lets sites join and throws them out; the center's daemon has one.
pub trait Gatekeeper: Send + Sync {
    /// A join token for one site, good for `lifetime_s` seconds.
    ///
    /// # Errors
    /// When it cannot be made.
    fn invite(&self, site: &Name, kind: SiteKind, lifetime_s: u64) -> Result<String, Fault>;

    /// The join tokens that are kept.
    fn tokens(&self) -> Vec<TokenInfo>;

    /// Takes back a join token that nobody has used.
    ///
    /// # Errors
    /// Not found; conflict when a site has joined with it; when it cannot be written down.
    fn withdraw(&self, token: &str) -> Result<(), Fault>;

    /// No certificate and no join token of the site is accepted any more. Answers with the list
    /// that the other sites need.
    ///
    /// # Errors
    /// When that cannot be written down.
    fn revoke(&self, site: &Name) -> Result<Revocations, Fault>;
}

/// What the handlers share.
#[derive(Clone)]
pub struct Api {
    pub(crate) controller: Arc<Controller>,
    pub(crate) gate: Arc<dyn Gatekeeper>,
    /// Hash of the operator token: comparing hashes takes the same time for every wrong token.
    token: blake3::Hash,
    streams: events::Streams,
    /// Ends the streams of events.
    stop: CancellationToken,
    /// Held by whoever reads the audit log.
    audit: Arc<tokio::sync::Semaphore>,
    /// Long requests for programs that are read and handed over, by tenant.
    programs: shares::Shares,
    /// Screens and consoles that are open, by site and tenant.
    screens: shares::Shares,
    /// Wrong tokens, by the site that handed them over.
    wrong: Arc<strikes::Strikes<Name>>,
}

/// The site that handed a request over, as its certificate says: put there by whoever reads its
/// link, and by nobody else. It has no rights of its own.
#[derive(Debug, Clone)]
pub(crate) struct By(pub(crate) Name);

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").finish_non_exhaustive()
    }
}

impl Api {
    /// The API of `controller`, for whoever has `token`.
    #[must_use]
    pub fn new(controller: Arc<Controller>, gate: Arc<dyn Gatekeeper>, token: &str) -> Self {
        let (streams, stop) = (events::Streams::default(), CancellationToken::new());
        let (token, audit) =
            (blake3::hash(token.as_bytes()), Arc::new(tokio::sync::Semaphore::new(1)));
        let (programs, screens) = (shares::Shares::default(), shares::Shares::default());
        let wrong = Arc::new(strikes::Strikes::new(WRONG_BY_SITE));
        Self { controller, gate, token, streams, stop, audit, programs, screens, wrong }
    }

    /// The same; its streams of events end with `stop`.
    #[must_use]
    pub fn until(self, stop: CancellationToken) -> Self {
        Self { stop, ..self }
    }
}

async fn authenticate(State(api): State<Api>, mut request: Request, next: Next) -> Response {
    let by = request.extensions().get::<By>().map(|By(site)| site.clone());
    let given = request
        .headers()
        .get(AUTHORIZATION)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.strip_prefix("Bearer "));
    // A good token first: whoever has one is not locked out by others of the same site.
    let Some(who) = given.and_then(|t| api.principal(t)) else {
        let shown = given.is_some();
        return HttpFault(api.nobody(by, shown, Instant::now())).into_response();
    };
    let asked = format!("{} {}", request.method(), request.uri().path());
    let who = Principal { by, ..who };
    if let Err(f) = not_by_a_site(&who, request.method(), request.uri().path()) {
        api.controller.accounts.note_refused(&who, &asked);
        return HttpFault(f).into_response();
    }
    let who = match api.acting(who, request.headers()) {
        Ok(who) => who,
        Err(f) => return HttpFault(f).into_response(),
    };
    request.extensions_mut().insert(who.clone());
    let answer = next.run(request).await;
    if answer.status() == StatusCode::FORBIDDEN {
        api.controller.accounts.note_refused(&who, &asked);
    }
    answer
}

/// Refuses what does not come by a site: a site sees the tokens that pass there, and one that was
/// stolen must not come to rule the cloud by them, nor to have tokens of its own.
fn not_by_a_site(who: &Principal, method: &Method, path: &str) -> Result<(), Fault> {
    let Some(site) = &who.by else { return Ok(()) };
    let refuse = |words: String| {
        let hint = "ask the center itself: --api URL";
        Err(Fault::new(Code::Forbidden, words).hint(hint))
    };
    if who.is_operator() {
        return refuse(format!(
            "operators are not heard by way of site '{site}', which sees the tokens that pass there"
        ));
    }
    if method == Method::POST && matches!(path, "/v1/api-tokens" | "/v1/tokens") {
        return refuse(format!(
            "tokens are not made by way of site '{site}', which would see them"
        ));
    }
    Ok(())
}

impl Api {
    /// How many of `all` places one tenant may take: all while there is no other.
    fn share(&self, all: usize) -> usize {
        let others = self.controller.registry().people().tenants().len() > 1;
        if others { all / 4 } else { all }
    }

    /// What is said to a request of nobody; whether it showed a token, and by which site it came.
    fn nobody(&self, by: Option<Name>, shown: bool, now: Instant) -> Fault {
        if let (Some(site), true) = (by, shown) {
            if let Err(left) = self.wrong.reserve(&site, now) {
                return strikes::too_many(&format!("site '{site}'"), left);
            }
            tracing::warn!(%site, "a wrong token came by this site");
        }
        let words = if shown {
            "that is no operator token of this center, nor a user's that is good"
        } else {
            "an operator token or a user's is needed"
        };
        Fault::new(Code::Unauthenticated, words)
            .hint("it is in ~/.config/godwit/token of whoever started the center; set GODWIT_TOKEN")
    }

    /// Who shows that token.
    fn principal(&self, token: &str) -> Option<Principal> {
        // `blake3::Hash` compares in constant time.
        if blake3::hash(token.as_bytes()) == self.token {
            return Some(Principal::operator());
        }
        self.controller.registry().people().principal(token, UnixMs::now())
    }

    /// The same in the tenant that the request names.
    fn acting(&self, mut who: Principal, headers: &HeaderMap) -> Result<Principal, Fault> {
        let Some(named) = headers.get(TENANT_HEADER) else { return Ok(who) };
        let named = name(named.to_str().unwrap_or_default())?;
        let there = self.controller.registry().people().tenant(&named).is_ok();
        if !there || !who.is_operator() && named != who.tenant {
            return Err(crate::controller::authorize::unseen("tenant", named.as_str()));
        }
        who.tenant = named;
        who.narrowed = true;
        Ok(who)
    }
}

/// Who makes a request.
pub(crate) struct Who(pub(crate) Principal);

impl std::ops::Deref for Who {
    type Target = Principal;
    fn deref(&self) -> &Principal {
        &self.0
    }
}

impl<S: Sync> FromRequestParts<S> for Who {
    type Rejection = HttpFault;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, HttpFault> {
        let who = parts.extensions.get::<Principal>().cloned();
        who.map(Self).ok_or_else(|| Fault::internal("a request of nobody").into())
    }
}

/// A [`Fault`] as a response.
#[derive(Debug)]
pub struct HttpFault(pub Fault);

impl From<Fault> for HttpFault {
    fn from(f: Fault) -> Self {
        Self(f)
    }
}

impl From<crate::registry::RegistryError> for HttpFault {
    fn from(e: crate::registry::RegistryError) -> Self {
        Self(crate::registry::registry_fault(e))
    }
}

impl IntoResponse for HttpFault {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.http_status())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if self.0.code == Code::Internal {
            tracing::error!(error = %self.0, "a request failed");
        }
        (status, axum::Json(self.0)).into_response()
    }
}

pub(crate) type Answer<T> = Result<T, HttpFault>;

/// A JSON body of at most `MAX` bytes; an empty one is `{}`.
pub(crate) struct Payload<T, const MAX: usize = MAX_BODY>(pub(crate) T);

impl<T: DeserializeOwned, S: Sync, const MAX: usize> FromRequest<S> for Payload<T, MAX> {
    type Rejection = HttpFault;
    async fn from_request(request: Request<Body>, _: &S) -> Result<Self, HttpFault> {
        let typed = is_type(request.headers(), "application/json");
        let body = tokio::time::timeout(BODY_WITHIN, read_body(request.into_body(), MAX))
            .await
            .map_err(|_| Fault::new(Code::TimedOut, "the body did not come in time"))??;
        if body.is_empty() {
            return parse(b"{}");
        }
        if !typed {
            return Err(Fault::invalid("the body must be application/json").into());
        }
        parse(&body)
    }
}

/// Whether a body is of that type, whatever parameters the type has.
pub(crate) fn is_type(headers: &HeaderMap, wanted: &str) -> bool {
    let given = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    given.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(wanted)
}

async fn read_body(body: Body, max: usize) -> Result<Vec<u8>, Fault> {
    let too_large = || Fault::new(Code::TooLarge, format!("the body is over {max} bytes"));
    let announced = body.size_hint().lower();
    let mut stream = body.into_data_stream();
    if announced > max as u64 {
        drop_rest(&mut stream).await;
        return Err(too_large());
    }
    let mut all = Vec::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|e| Fault::invalid(format!("the body was cut off: {e}")))?;
        if all.len() + chunk.len() > max {
            drop_rest(&mut stream).await;
            return Err(too_large());
        }
        all.extend_from_slice(&chunk);
    }
    Ok(all)
}

/// Reads a refused body on for a while, so that its sender comes to read the answer.
pub(crate) async fn drop_rest(stream: &mut BodyDataStream) {
    let rest = async {
        let mut dropped = 0;
        while let Some(Ok(chunk)) = stream.next().await {
            dropped += chunk.len();
            if dropped > DROPPED {
                return;
            }
        }
    };
    // Who sends too slowly has the connection closed under him.
    let _ = tokio::time::timeout(DROPPED_WITHIN, rest).await;
}

fn parse<T: DeserializeOwned, const MAX: usize>(
    bytes: &[u8],
) -> Result<Payload<T, MAX>, HttpFault> {
    serde_json::from_slice(bytes)
        .map(Payload)
        .map_err(|e| Fault::invalid(format!("the body: {e}")).into())
}

/// The query string.
pub(crate) struct Params<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Params<T> {
    type Rejection = HttpFault;
    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, HttpFault> {
        axum::extract::Query::try_from_uri(&parts.uri)
            .map(|q: axum::extract::Query<T>| Self(q.0))
            .map_err(|e| Fault::invalid(format!("the query: {}", e.body_text())).into())
    }
}

/// The named parts of a path.
pub(crate) struct Path<T>(pub(crate) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = HttpFault;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, HttpFault> {
        axum::extract::Path::from_request_parts(parts, state)
            .await
            .map(|p: axum::extract::Path<T>| Self(p.0))
            .map_err(|e| Fault::invalid(format!("the path: {}", e.body_text())).into())
    }
}

/// Asks only for the plan.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, IntoParams, ToSchema)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DryRun {
    /// Check and tell, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

impl DryRun {
    pub(crate) const fn mode(self) -> Mode {
        if self.dry_run { Mode::DryRun } else { Mode::Act }
    }
}

/// 202 with the operation, or 200 with the plan.
pub(crate) fn accepted(a: Accepted) -> Response {
    let status = if a.op.is_some() { StatusCode::ACCEPTED } else { StatusCode::OK };
    (status, axum::Json(a)).into_response()
}

pub(crate) fn name(text: &str) -> Result<Name, Fault> {
    Name::new(text).map_err(|e| Fault::invalid(e.to_string()))
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Godwit",
        description = "Execution environments that start in an instant and move while they work.",
        license(name = "MIT OR Apache-2.0")
    ),
    paths(
        meta::healthz,
        meta::metrics,
        sites::list,
        sites::one,
        sites::revoke,
        sites::token,
        sites::tokens,
        sites::withdraw,
        people::tenants,
        networks::list,
        networks::create,
        networks::one,
        networks::delete,
        people::tenant_create,
        people::tenant_delete,
        people::quota,
        people::quota_set,
        people::users,
        people::user_create,
        people::user_delete,
        people::tokens,
        people::token_create,
        people::token_delete,
        people::audit,
        people::audit_end,
        images::list,
        images::one,
        images::build,
        images::remove,
        vms::list,
        vms::create,
        vms::one,
        vms::delete,
        vms::start,
        vms::stop,
        vms::dock,
        vms::migrate,
        vms::console,
        vms::screenshot,
        vms::type_text,
        exec::start,
        exec::wait,
        vms::view,
        vms::attach,
        substrates::list,
        substrates::one,
        substrates::remove,
        substrates::rebuild,
        substrates::grant,
        substrates::revoke,
        substrates::export,
        substrates::import,
        substrates::pool,
        substrates::pool_check,
        operations::list,
        operations::one,
        operations::events,
        operations::cancel,
        events::events,
    ),
    components(schemas(Fault, events::Reset))
)]
struct Spec;

/// The OpenAPI description.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    Spec::openapi()
}
