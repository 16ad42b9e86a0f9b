//! The connection to the API server. It costs a quiet site little: one HTTP/2 connection for all watches (kube's own client
//! opens one HTTP/1.1 connection per watch), no bookmarks, and compressed lists.

use std::time::Duration;

use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client as HttpClient, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use kube::{
    Client, Config,
    client::{ConfigExt, retry::RetryPolicy},
};
use tower::{BoxError, ServiceBuilder, retry::RetryLayer};
use tower_http::decompression::DecompressionLayer;

/// Interval of HTTP/2 pings: without bookmarks, a healthy watch may be silent for minutes, and an API server whose host
/// lost power never answers.
const PING: Duration = Duration::from_secs(60);
/// Maximum time for the response to a ping.
const PONG: Duration = Duration::from_secs(20);
/// Length of a watch: kube-runtime's default.
const WATCH: Duration = Duration::from_secs(290);
/// Idle time before TCP keepalives, for an API server or a proxy in front of it that has no HTTP/2. HTTP/2 pings come first.
const KEEPALIVE: Duration = Duration::from_secs(90);

/// Errors of [`client`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The credentials, certificates or settings of the connection cannot be used.
    #[error("cannot use the settings for the API server: {0}")]
    Config(#[from] kube::Error),
    /// The kubeconfig's `tls-server-name` is no name.
    #[error("tls-server-name {0:?} in the kubeconfig is not a valid host name")]
    ServerName(String),
}

/// A client of the API server.
pub fn client(config: Config) -> Result<Client, Error> {
    if config.proxy_url.is_some() {
        // Only kube's own client connects through a proxy. It has no pings, so a request is given up instead: later than a
        // watch ends by itself.
        let mut config = config;
        (config.read_timeout, config.reset_reader_on_write) = (Some(WATCH + PONG), true);
        return Ok(Client::try_from(config)?);
    }
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(config.connect_timeout);
    tcp.set_keepalive(Some(KEEPALIVE));
    tcp.set_keepalive_interval(Some(PONG / 4));
    tcp.set_keepalive_retries(Some(4));
    let mut tls = HttpsConnectorBuilder::new().with_tls_config(config.rustls_client_config()?).https_or_http();
    if let Some(name) = &config.tls_server_name {
        let parsed = name.clone().try_into().map_err(|_| Error::ServerName(name.clone()))?;
        tls = tls.with_server_name_resolver(FixedServerNameResolver::new(parsed));
    }
    let tls = tls.enable_all_versions().wrap_connector(tcp);
    let http = HttpClient::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        // The pool counts a shared connection from the last request as idle, also while watches run on it. It would open a
        // new one whenever a watch begins again.
        .pool_idle_timeout(None)
        .http2_keep_alive_interval(PING)
        .http2_keep_alive_timeout(PONG)
        .http2_keep_alive_while_idle(true)
        .build(tls);
    let service = ServiceBuilder::new()
        .option_layer(config.default_retry.then(|| RetryLayer::new(RetryPolicy::server_retry())))
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .layer(config.base_uri_layer())
        .layer(DecompressionLayer::new())
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}
