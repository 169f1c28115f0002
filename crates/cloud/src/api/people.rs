//! Tenants, users, and the tokens with which users reach this API.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use godwit_types::Fault;
use serde::Deserialize;
use utoipa::IntoParams;

use super::{Answer, Api, Params, Path, Payload, Who, name};
use crate::controller::{ApiToken, Controller, NewApiToken, NewTenant, NewUser};
use crate::registry::{
    AuditEnd, AuditEntry, MAX_AUDIT, Quota, TenantQuota, TenantRecord, TokenInfo, UserRecord,
};

/// All tenants for an operator, its own for a user.
#[utoipa::path(get, path = "/v1/tenants", responses((status = 200, body = Vec<TenantRecord>)))]
pub(super) async fn tenants(State(api): State<Api>, who: Who) -> Answer<Json<Vec<TenantRecord>>> {
    Ok(Json(api.controller.accounts.tenants_for(&who)))
}

/// Makes a tenant.
#[utoipa::path(post, path = "/v1/tenants", request_body = NewTenant,
    responses((status = 201, body = TenantRecord), (status = 403, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn tenant_create(
    State(api): State<Api>,
    who: Who,
    Payload(new): Payload<NewTenant>,
) -> Answer<(StatusCode, Json<TenantRecord>)> {
    Ok((StatusCode::CREATED, Json(api.controller.accounts.tenant_create(&who, new)?)))
}

/// Removes a tenant that has nothing and nobody any more.
#[utoipa::path(delete, path = "/v1/tenants/{tenant}", params(("tenant" = String, Path)),
    responses((status = 204), (status = 403, body = Fault), (status = 404, body = Fault),
    (status = 409, body = Fault)))]
pub(super) async fn tenant_delete(
    State(api): State<Api>,
    who: Who,
    Path(tenant): Path<String>,
) -> Answer<StatusCode> {
    api.controller.accounts.tenant_delete(&who, &name(&tenant)?)?;
    Ok(StatusCode::NO_CONTENT)
}

/// How much a tenant may have, and has.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/quota", params(("tenant" = String, Path)),
    responses((status = 200, body = TenantQuota), (status = 404, body = Fault)))]
pub(super) async fn quota(
    State(api): State<Api>,
    who: Who,
    Path(tenant): Path<String>,
) -> Answer<Json<TenantQuota>> {
    Ok(Json(api.controller.accounts.quota(&who, &name(&tenant)?)?))
}

/// Sets how much a tenant may have; what is left out has no limit.
#[utoipa::path(put, path = "/v1/tenants/{tenant}/quota", request_body = Quota,
    params(("tenant" = String, Path)),
    responses((status = 200, body = TenantQuota), (status = 403, body = Fault), (status = 404, body = Fault)))]
pub(super) async fn quota_set(
    State(api): State<Api>,
    who: Who,
    Path(tenant): Path<String>,
    Payload(quota): Payload<Quota>,
) -> Answer<Json<TenantQuota>> {
    Ok(Json(api.controller.accounts.quota_set(&who, &name(&tenant)?, quota)?))
}

/// The users of the tenant; of all tenants for an operator who names none.
#[utoipa::path(get, path = "/v1/users", responses((status = 200, body = Vec<UserRecord>)))]
pub(super) async fn users(State(api): State<Api>, who: Who) -> Answer<Json<Vec<UserRecord>>> {
    Ok(Json(api.controller.accounts.users_for(&who)))
}

/// Makes a user.
#[utoipa::path(post, path = "/v1/users", request_body = NewUser,
    responses((status = 201, body = UserRecord), (status = 403, body = Fault), (status = 409, body = Fault)))]
pub(super) async fn user_create(
    State(api): State<Api>,
    who: Who,
    Payload(new): Payload<NewUser>,
) -> Answer<(StatusCode, Json<UserRecord>)> {
    Ok((StatusCode::CREATED, Json(api.controller.accounts.user_create(&who, new)?)))
}

/// Removes a user and its tokens.
#[utoipa::path(delete, path = "/v1/users/{user}", params(("user" = String, Path)),
    responses((status = 204), (status = 403, body = Fault), (status = 404, body = Fault),
    (status = 409, body = Fault)))]
pub(super) async fn user_delete(
    State(api): State<Api>,
    who: Who,
    Path(user): Path<String>,
) -> Answer<StatusCode> {
    api.controller.accounts.user_delete(&who, &user)?;
    Ok(StatusCode::NO_CONTENT)
}

/// The tokens for this API, without their secrets. (Those by which sites join are `/v1/tokens`.)
#[utoipa::path(get, path = "/v1/api-tokens", responses((status = 200, body = Vec<TokenInfo>)))]
pub(super) async fn tokens(State(api): State<Api>, who: Who) -> Answer<Json<Vec<TokenInfo>>> {
    Ok(Json(api.controller.accounts.tokens_for(&who)))
}

/// Makes a token for this API; its text is told this once.
#[utoipa::path(post, path = "/v1/api-tokens", request_body = NewApiToken,
    responses((status = 201, body = ApiToken), (status = 400, body = Fault), (status = 403, body = Fault),
    (status = 404, body = Fault)))]
pub(super) async fn token_create(
    State(api): State<Api>,
    who: Who,
    Payload(new): Payload<NewApiToken>,
) -> Answer<(StatusCode, Json<ApiToken>)> {
    Ok((StatusCode::CREATED, Json(api.controller.accounts.token_create(&who, new)?)))
}

/// Removes a token: it is good for nothing from now on.
#[utoipa::path(delete, path = "/v1/api-tokens/{id}", params(("id" = String, Path)),
    responses((status = 204), (status = 403, body = Fault), (status = 404, body = Fault)))]
pub(super) async fn token_delete(
    State(api): State<Api>,
    who: Who,
    Path(id): Path<String>,
) -> Answer<StatusCode> {
    api.controller.accounts.token_delete(&who, &id)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Reads the audit log from the disk, beside what else is served and one reader after the other.
async fn read_audit<T: Send + 'static>(
    api: &Api,
    read: impl FnOnce(&Controller) -> Result<T, Fault> + Send + 'static,
) -> Answer<T> {
    let gone = |_| Fault::internal("the audit log was not read");
    let place = api.audit.clone().acquire_owned().await.map_err(|e| gone(e.to_string()))?;
    let controller = api.controller.clone();
    let read = tokio::task::spawn_blocking(move || {
        let _place = place;
        read(&controller)
    });
    Ok(read.await.map_err(|e| gone(e.to_string()))??)
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Newest {
    /// At most so many entries, and at most 1000; 100 when left out.
    limit: Option<u32>,
    /// Only those before the entry of this number: the one that the last answer began with.
    before: Option<u64>,
}

/// The newest entries of the audit log, oldest first: of all tenants for an operator who names none.
/// They are looked for among the newest 100,000, or the 100,000 before the one that `before` names.
#[utoipa::path(get, path = "/v1/audit", params(Newest),
    responses((status = 200, body = Vec<AuditEntry>), (status = 403, body = Fault)))]
pub(super) async fn audit(
    State(api): State<Api>,
    who: Who,
    Params(newest): Params<Newest>,
) -> Answer<Json<Vec<AuditEntry>>> {
    let limit = usize::try_from(newest.limit.unwrap_or(100)).unwrap_or(MAX_AUDIT);
    Ok(Json(read_audit(&api, move |c| c.accounts.audit_for(&who, limit, newest.before)).await?))
}

/// Reads the whole audit log: where it ends, if it is whole.
#[utoipa::path(get, path = "/v1/audit/end",
    responses((status = 200, body = AuditEnd), (status = 403, body = Fault), (status = 422, body = Fault)))]
pub(super) async fn audit_end(State(api): State<Api>, who: Who) -> Answer<Json<AuditEnd>> {
    Ok(Json(read_audit(&api, move |c| c.accounts.audit_verify(&who)).await?))
}
