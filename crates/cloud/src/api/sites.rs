//! Sites and join tokens.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use godwit_transfer::keys::{TokenInfo, TokenState};
use godwit_types::{Code, Fault, Name, SiteKind, UnixMs};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Answer, Api, Path, Payload, Who, name};
use crate::access::{Action, Object, Principal};
use crate::controller::authorize::allow;
use crate::registry::SiteRecord;

/// Whom a join token is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewToken {
    /// The name that the site will have.
    pub site: Name,
    /// What it will be; an AP when left out.
    pub kind: Option<SiteKind>,
    /// How long it is good, in seconds; one hour when left out.
    pub lifetime_s: Option<u64>,
}

/// A join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenText {
    /// The site it is for.
    pub site: Name,
    /// What the site's operator gives to `godwit site join`.
    pub token: String,
}

/// What became of a join token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TokenUse {
    /// A site can join with it.
    Unused,
    /// A site has joined with it.
    Used,
    /// It was taken back.
    Withdrawn,
    /// Its time is over, and nobody used it.
    Expired,
}

/// A join token as the center keeps it: without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// Which: 16 hex digits.
    pub id: String,
    /// The site it is for.
    pub site: Name,
    /// What that site will be.
    pub kind: SiteKind,
    /// Its end.
    pub expires: UnixMs,
    /// What became of it.
    pub state: TokenUse,
}

impl Token {
    fn of(t: TokenInfo, now: UnixMs) -> Self {
        let expires = UnixMs(t.expires.saturating_mul(1000));
        let state = match t.state {
            TokenState::Unused if expires <= now => TokenUse::Expired,
            TokenState::Unused => TokenUse::Unused,
            TokenState::Used { .. } => TokenUse::Used,
            TokenState::Withdrawn => TokenUse::Withdrawn,
        };
        Self { id: t.id, site: t.site, kind: t.kind, expires, state }
    }
}

/// The longest life of a join token in seconds: a week.
const MAX_LIFETIME_S: u64 = 7 * 86_400;

/// All sites.
#[utoipa::path(get, path = "/v1/sites", responses((status = 200, body = Vec<SiteRecord>)))]
pub(super) async fn list(State(api): State<Api>, who: Who) -> Answer<Json<Vec<SiteRecord>>> {
    allow(&who, Action::See, &Object::Site, ("site", ""))?;
    let all = api.controller.registry().sites().all()?;
    Ok(Json(all.into_iter().map(|s| as_it_is(&api, &who, s)).collect()))
}

/// One site.
#[utoipa::path(get, path = "/v1/sites/{name}", params(("name" = String, Path)),
    responses((status = 200, body = SiteRecord), (status = 404, body = Fault)))]
pub(super) async fn one(
    State(api): State<Api>,
    who: Who,
    Path(site): Path<String>,
) -> Answer<Json<SiteRecord>> {
    allow(&who, Action::See, &Object::Site, ("site", &site))?;
    Ok(Json(as_it_is(&api, &who, api.controller.registry().sites().get(&name(&site)?)?)))
}

/// A lease is worth something only while the site is connected: one from before the center was
/// started again is not.
fn as_it_is(api: &Api, who: &Principal, site: SiteRecord) -> SiteRecord {
    let mut site = api.controller.finder.site_for(who, site);
    if api.controller.sites.host(&site.name).is_err() {
        site.lease_until = site.lease_until.min(UnixMs(UnixMs::now().0.saturating_sub(1)));
    }
    site
}

/// Revokes a site: none of its certificates is accepted any more, here or at the other sites,
/// and no join token that was made for it. A new token lets it join anew.
#[utoipa::path(delete, path = "/v1/sites/{name}", params(("name" = String, Path)),
    responses((status = 204), (status = 404, body = Fault)))]
pub(super) async fn revoke(
    State(api): State<Api>,
    who: Who,
    Path(site): Path<String>,
) -> Answer<StatusCode> {
    allow(&who, Action::Change, &Object::Site, ("site", &site))?;
    let site = name(&site)?;
    let record = api.controller.registry().sites().get(&site)?;
    if record.kind == SiteKind::Center {
        return Err(Fault::invalid("the center cannot be revoked").into());
    }
    let revoked = api.gate.revoke(&site)?;
    api.controller.registry().sites().revoke(&site)?;
    if let Ok(host) = api.controller.sites.host(&site) {
        api.controller.detach(&host);
    }
    api.controller.accounts.note_of_cloud(&who, "site revoke", site.as_str());
    api.controller.sites.spread_revocations(&revoked).await;
    Ok(StatusCode::NO_CONTENT)
}

/// The join tokens of the last weeks, those that end last first.
#[utoipa::path(get, path = "/v1/tokens", responses((status = 200, body = Vec<Token>)))]
pub(super) async fn tokens(State(api): State<Api>, who: Who) -> Answer<Json<Vec<Token>>> {
    allow(&who, Action::Change, &Object::Cloud, ("site", ""))?;
    let now = UnixMs::now();
    let mut all: Vec<_> = api.gate.tokens().into_iter().map(|t| Token::of(t, now)).collect();
    all.sort_by(|a, b| b.expires.cmp(&a.expires).then_with(|| a.id.cmp(&b.id)));
    Ok(Json(all))
}

/// Takes back a join token that nobody has used.
#[utoipa::path(delete, path = "/v1/tokens/{id}", params(("id" = String, Path)),
    responses((status = 204), (status = 404, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn withdraw(
    State(api): State<Api>,
    who: Who,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    allow(&who, Action::Change, &Object::Cloud, ("site", ""))?;
    api.gate.withdraw(&id)?;
    api.controller.accounts.note_of_cloud(&who, "join token withdraw", &id);
    Ok(StatusCode::NO_CONTENT)
}

/// Makes a join token.
#[utoipa::path(post, path = "/v1/tokens", request_body = NewToken,
    responses((status = 201, body = TokenText), (status = 400, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn token(
    State(api): State<Api>,
    who: Who,
    Payload(want): Payload<NewToken>,
) -> Answer<(StatusCode, Json<TokenText>)> {
    allow(&who, Action::Change, &Object::Cloud, ("site", ""))?;
    let lifetime = want.lifetime_s.unwrap_or(3600);
    if !(1..=MAX_LIFETIME_S).contains(&lifetime) {
        return Err(Fault::invalid("a join token is good for 1 s to 7 days").into());
    }
    let kind = want.kind.unwrap_or(SiteKind::Ap);
    if kind == SiteKind::Center {
        return Err(Fault::invalid("there is one center; let an ap or a device join").into());
    }
    let known = api.controller.registry().sites().all()?;
    if known.iter().any(|s| s.kind == SiteKind::Center && s.name == want.site) {
        let words = format!("'{}' is the center's own site", want.site);
        return Err(Fault::new(Code::Exists, words).hint("choose another name").into());
    }
    let token = api.gate.invite(&want.site, kind, lifetime)?;
    api.controller.accounts.note_of_cloud(&who, "join token create", want.site.as_str());
    Ok((StatusCode::CREATED, Json(TokenText { site: want.site, token })))
}
