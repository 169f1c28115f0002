//! Sites and join tokens.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use godwit_types::{Code, Name, SiteKind};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Answer, Api, Payload, name};
use crate::error::Fault;
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

/// The longest life of a join token in seconds: a week.
const MAX_LIFETIME_S: u64 = 7 * 86_400;

/// All sites.
#[utoipa::path(get, path = "/v1/sites", responses((status = 200, body = Vec<SiteRecord>)))]
pub(super) async fn list(State(api): State<Api>) -> Answer<Json<Vec<SiteRecord>>> {
    Ok(Json(api.controller.registry().sites()?))
}

/// One site.
#[utoipa::path(get, path = "/v1/sites/{name}", params(("name" = String, Path)),
    responses((status = 200, body = SiteRecord), (status = 404, body = Fault)))]
pub(super) async fn one(
    State(api): State<Api>,
    Path(site): Path<String>,
) -> Answer<Json<SiteRecord>> {
    Ok(Json(api.controller.registry().site(&name(&site)?)?))
}

/// Revokes a site: its certificate is accepted no more.
#[utoipa::path(delete, path = "/v1/sites/{name}", params(("name" = String, Path)),
    responses((status = 204), (status = 404, body = Fault)))]
pub(super) async fn revoke(State(api): State<Api>, Path(site): Path<String>) -> Answer<StatusCode> {
    let site = name(&site)?;
    let record = api.controller.registry().site(&site)?;
    if record.kind == SiteKind::Center {
        return Err(Fault::invalid("the center cannot be revoked").into());
    }
    api.gate.revoke(&site)?;
    api.controller.registry().site_revoke(&site)?;
    if let Ok(host) = api.controller.host(&site) {
        api.controller.detach(&host);
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Makes a join token.
#[utoipa::path(post, path = "/v1/tokens", request_body = NewToken,
    responses((status = 201, body = TokenText), (status = 400, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn token(
    State(api): State<Api>,
    Payload(want): Payload<NewToken>,
) -> Answer<(StatusCode, Json<TokenText>)> {
    let lifetime = want.lifetime_s.unwrap_or(3600);
    if !(1..=MAX_LIFETIME_S).contains(&lifetime) {
        return Err(Fault::invalid("a join token is good for 1 s to 7 days").into());
    }
    let kind = want.kind.unwrap_or(SiteKind::Ap);
    if kind == SiteKind::Center {
        return Err(Fault::invalid("there is one center; let an ap or a device join").into());
    }
    let known = api.controller.registry().sites()?;
    if known.iter().any(|s| s.kind == SiteKind::Center && s.name == want.site) {
        let words = format!("'{}' is the center's own site", want.site);
        return Err(Fault::new(Code::Exists, words).hint("choose another name").into());
    }
    let token = api.gate.invite(&want.site, kind, lifetime)?;
    Ok((StatusCode::CREATED, Json(TokenText { site: want.site, token })))
}
