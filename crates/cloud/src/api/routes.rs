//! What is served behind the API's socket, put together of pieces.
//!
//! The program that starts a center says which pieces those are; a room above this one adds its
//! own. All of them have the socket's limits, and one way to say who asks.

use axum::http::StatusCode;
use axum::routing::{delete, get, post};
use axum::{Json, Router, middleware};

use super::{
    Api, HttpFault, authenticate, events, exec, images, meta, networks, operations, people, sites,
    substrates, vms,
};
use godwit_types::Fault;

/// Routes that are served together. A path is in one piece only, and none has a fallback: axum
/// panics at the start otherwise.
#[derive(Debug, Clone, Default)]
pub struct Routes {
    open: Router,
    guarded: Router,
}

impl Routes {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With routes that anybody may ask for who reaches the socket.
    #[must_use]
    pub fn open(self, routes: Router) -> Self {
        Self { open: self.open.merge(routes), ..self }
    }

    /// With routes for whoever shows a good token. The request carries its
    /// [`Principal`](crate::access::Principal) as an extension; what that one may do is for the
    /// handler to say.
    #[must_use]
    pub fn guarded(self, routes: Router) -> Self {
        Self { guarded: self.guarded.merge(routes), ..self }
    }

    /// Both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        self.open(other.open).guarded(other.guarded)
    }
}

impl Api {
    /// `/healthz`, for everybody.
    #[must_use]
    pub fn health(&self) -> Routes {
        Routes::new()
            .open(Router::new().route("/healthz", get(meta::healthz)).with_state(self.clone()))
    }

    /// `/metrics`, for operators.
    #[must_use]
    pub fn metrics(&self) -> Routes {
        let routes = Router::new().route("/metrics", get(meta::metrics));
        Routes::new().guarded(routes.with_state(self.clone()))
    }

    /// The API itself, `/v1`.
    #[must_use]
    pub fn v1(&self) -> Routes {
        let routes = Router::new()
            .route("/v1/openapi.json", get(meta::spec))
            .route("/v1/sites", get(sites::list))
            .route("/v1/sites/{name}", get(sites::one).delete(sites::revoke))
            .route("/v1/tokens", get(sites::tokens).post(sites::token))
            .route("/v1/tokens/{id}", delete(sites::withdraw))
            .route("/v1/tenants", get(people::tenants).post(people::tenant_create))
            .route("/v1/tenants/{tenant}", delete(people::tenant_delete))
            .route("/v1/networks", get(networks::list).post(networks::create))
            .route("/v1/networks/{network}", get(networks::one).delete(networks::delete))
            .route("/v1/users", get(people::users).post(people::user_create))
            .route("/v1/users/{user}", delete(people::user_delete))
            .route("/v1/api-tokens", get(people::tokens).post(people::token_create))
            .route("/v1/api-tokens/{id}", delete(people::token_delete))
            .route("/v1/audit", get(people::audit))
            .route("/v1/audit/end", get(people::audit_end))
            .route("/v1/images", get(images::list))
            .route("/v1/images/{name}", get(images::one).delete(images::remove))
            .route("/v1/images/{name}/build", post(images::build))
            .route("/v1/vms", get(vms::list).post(vms::create))
            .route("/v1/vms/{vm}", get(vms::one).delete(vms::delete))
            .route("/v1/vms/{vm}/start", post(vms::start))
            .route("/v1/vms/{vm}/stop", post(vms::stop))
            .route("/v1/vms/{vm}/dock", post(vms::dock))
            .route("/v1/vms/{vm}/migrate", post(vms::migrate))
            .route("/v1/vms/{vm}/console", get(vms::console))
            .route("/v1/vms/{vm}/screenshot", get(vms::screenshot))
            .route("/v1/vms/{vm}/type", post(vms::type_text))
            .route("/v1/vms/{vm}/exec", post(exec::start))
            .route("/v1/vms/{vm}/exec/{pid}", get(exec::wait))
            .route("/v1/vms/{vm}/view", get(vms::view))
            .route("/v1/vms/{vm}/attach", get(vms::attach))
            .route("/v1/substrates", get(substrates::list).post(substrates::import))
            .route("/v1/substrates/{substrate}", get(substrates::one))
            .route("/v1/substrates/{substrate}", delete(substrates::remove))
            .route("/v1/substrates/{substrate}/grants", post(substrates::grant))
            .route("/v1/substrates/{substrate}/grants/{tenant}", delete(substrates::revoke))
            .route("/v1/tenants/{tenant}/quota", get(people::quota).put(people::quota_set))
            .route("/v1/substrates/{substrate}/export", get(substrates::export))
            .route("/v1/substrates/{substrate}/rebuild", post(substrates::rebuild))
            .route("/v1/ops", get(operations::list))
            .route("/v1/ops/{id}", get(operations::one))
            .route("/v1/ops/{id}/events", get(operations::events))
            .route("/v1/ops/{id}/cancel", post(operations::cancel))
            .route("/v1/events", get(events::events))
            .route("/v1/pool", get(substrates::pool))
            .route("/v1/pool/{site}/check", post(substrates::pool_check));
        Routes::new().guarded(routes.with_state(self.clone()))
    }

    /// One router of all these routes: who asks is found out first, and what is none of them is
    /// told to nobody else.
    pub fn serve(&self, routes: Routes) -> Router {
        let guarded = routes
            .guarded
            .fallback(|| async {
                HttpFault(Fault::not_found("no such path").hint("see /v1/openapi.json"))
            })
            .method_not_allowed_fallback(|| async {
                let f = Fault::invalid("this path does not take that method");
                (StatusCode::METHOD_NOT_ALLOWED, Json(f.hint("see /v1/openapi.json")))
            })
            .layer(middleware::from_fn_with_state(self.clone(), events::say_revision))
            .layer(middleware::from_fn_with_state(self.clone(), authenticate));
        routes.open.merge(guarded)
    }
}
