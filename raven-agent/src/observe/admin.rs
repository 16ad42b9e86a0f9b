//! HTTP for operators and machines: `/metrics`, `/status`, `/drops`, `/connections`, `/healthz` and `/readyz`. With
//! `--metrics-secure`, [`secure`](super::secure) decides who may read them.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode,
    body::Bytes,
    header::{HeaderValue, WWW_AUTHENTICATE},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};

use super::{
    Drops, metrics,
    publish::Latest,
    secure::{Access, Refusal},
    status,
};
use crate::{
    proxy::{ProxyReport, stats::Stats},
    watch::Outages,
};

/// Timeout for a TLS handshake and for the head of a request.
const HEAD: Duration = Duration::from_secs(5);

/// Maximum age of the last run. A run takes seconds, and the next one starts within half a minute; after this time the
/// loop hangs. A restart loses no packet.
const STUCK: Duration = Duration::from_secs(300);

/// Answer while nothing is known yet.
const WAITING: &str = "waiting for the topology\n";

/// The state that is served.
#[derive(Clone)]
pub struct Sources {
    /// The last report.
    pub latest: watch::Receiver<Latest>,
    /// State of the proxy.
    pub proxy: watch::Receiver<Option<ProxyReport>>,
    /// Samples of dropped packets.
    pub drops: Drops,
    /// Counters of the proxy.
    pub stats: Stats,
    /// Outages of the watches of the API server.
    pub outages: Outages,
}

/// What is served on an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paths {
    /// `/healthz` and `/readyz`, for the kubelet.
    Health,
    /// These, and what describes the node and its traffic.
    All,
}

/// Serves on `address` until the process ends, with `access` only to clients that it admits. A failure to listen is logged
/// and does not affect forwarding.
pub async fn serve(address: SocketAddr, paths: Paths, access: Option<Access>, sources: Sources) {
    let access = access.map(Arc::new);
    let listener = match bind(address).await {
        Ok(listener) => listener,
        Err(e) => {
            return tracing::error!(%address, error = %e, "cannot listen; metrics and health are not served on this address");
        }
    };
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(e) => {
                // Usually the limit of open files; it passes when connections end.
                tracing::warn!(%address, error = %e, "cannot accept connections; retrying");
                tokio::time::sleep(HEAD).await;
                continue;
            }
        };
        let (access, sources) = (access.clone(), sources.clone());
        tokio::spawn(async move {
            match access {
                Some(access) if !(from.ip().to_canonical().is_loopback() && is_plain(&stream).await) => {
                    encrypted(stream, paths, access, sources).await;
                }
                _ => http(stream, paths, None, sources).await,
            }
        });
    }
}

/// True if the client starts with anything but TLS, whose first record is a handshake (RFC 8446 §5.1).
async fn is_plain(stream: &TcpStream) -> bool {
    const HANDSHAKE: u8 = 22;
    let mut first = [0];
    matches!(timeout(HEAD, stream.peek(&mut first)).await, Ok(Ok(1))) && first != [HANDSHAKE]
}

async fn encrypted(stream: TcpStream, paths: Paths, access: Arc<Access>, sources: Sources) {
    let acceptor = match access.acceptor() {
        Ok(acceptor) => acceptor,
        Err(e) => {
            if access.may_warn() {
                tracing::warn!(error = %e, "cannot serve metrics");
            }
            return;
        }
    };
    // A failed handshake is the client's: it sent plain HTTP, or does not trust the certificate.
    if let Ok(Ok(stream)) = timeout(HEAD, acceptor.accept(stream)).await {
        http(stream, paths, Some(access), sources).await;
    }
}

/// Answers the request of a connection, with `access` only if the client may read the path.
async fn http<S>(stream: S, paths: Paths, access: Option<Arc<Access>>, sources: Sources)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let service = service_fn(move |request| {
        let (access, sources) = (access.clone(), sources.clone());
        async move {
            if let Some(access) = access
                && let Err(refusal) = access.check(&request).await
            {
                return Ok::<_, Infallible>(refused(&refusal));
            }
            Ok(answer(&request, paths, &sources))
        }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD).keep_alive(false);
    // Fails only if the client disconnects.
    let _ = builder.serve_connection(TokioIo::new(stream), service).await;
}

fn refused(refusal: &Refusal) -> Response<Full<Bytes>> {
    let mut response = text(refusal.status(), format!("{refusal}\n"));
    if refusal.status() == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

/// Binds `address`. A kernel without IPv6 refuses `[::]`; then all IPv4 addresses are used.
async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(_) if address.ip().is_unspecified() && address.is_ipv6() => {
            TcpListener::bind(("0.0.0.0", address.port())).await
        }
        result => result,
    }
}

fn answer<B>(request: &Request<B>, paths: Paths, sources: &Sources) -> Response<Full<Bytes>> {
    let report = sources.latest.borrow().as_ref().map(|(report, _)| report.clone());
    match (request.uri().path(), &report) {
        ("/healthz", _) => health(report.map(|r| r.ended.elapsed())),
        ("/readyz", None) => text(StatusCode::SERVICE_UNAVAILABLE, WAITING.to_owned()),
        ("/readyz", Some(r)) => {
            let failures = r.failures.iter().map(ToString::to_string);
            readiness(failures.chain(sources.outages.long(Instant::now())))
        }
        _ if paths == Paths::Health => {
            let elsewhere = "not found; available paths: /healthz, /readyz; others are served at --metric-bind-addr\n";
            text(StatusCode::NOT_FOUND, elsewhere.to_owned())
        }
        ("/status", None) => text(StatusCode::SERVICE_UNAVAILABLE, WAITING.to_owned()),
        ("/status", Some(r)) => text(StatusCode::OK, status::render(r, sources.proxy.borrow().as_ref())),
        ("/metrics", _) => match metrics::render(report.as_deref(), &sources.stats) {
            Ok(metrics) => text(StatusCode::OK, metrics),
            Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, e),
        },
        ("/connections", _) => text(StatusCode::OK, sources.stats.connections()),
        ("/drops", _) => text(StatusCode::OK, sources.drops.render(report.as_deref())),
        _ => {
            let paths = "not found; available paths: /metrics, /status, /drops, /connections, /healthz, /readyz\n";
            text(StatusCode::NOT_FOUND, paths.to_owned())
        }
    }
}

/// Ready if nothing is wrong; else lists what is, one line each.
fn readiness(problems: impl Iterator<Item = String>) -> Response<Full<Bytes>> {
    let lines: String = problems.map(|problem| format!("{problem}\n")).collect();
    if lines.is_empty() {
        return text(StatusCode::OK, "ok\n".to_owned());
    }
    text(StatusCode::SERVICE_UNAVAILABLE, lines)
}

/// `age`: time since the last run ended, if there was one.
fn health(age: Option<Duration>) -> Response<Full<Bytes>> {
    match age.filter(|age| *age > STUCK) {
        None => text(StatusCode::OK, "ok\n".to_owned()),
        Some(age) => {
            let message = format!("the last run ended {} s ago; the agent must be restarted\n", age.as_secs());
            text(StatusCode::SERVICE_UNAVAILABLE, message)
        }
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_without_a_completed_run_is_unhealthy() {
        assert_eq!(health(None).status(), StatusCode::OK, "it waits for the first topology");
        assert_eq!(health(Some(Duration::from_secs(60))).status(), StatusCode::OK);
        assert_eq!(health(Some(STUCK + Duration::from_secs(1))).status(), StatusCode::SERVICE_UNAVAILABLE);
    }

    #[test]
    fn health_port_serves_nothing_about_the_node() {
        let sources = Sources {
            latest: watch::Sender::default().subscribe(),
            proxy: watch::Sender::default().subscribe(),
            drops: Drops::default(),
            stats: Stats::default(),
            outages: Outages::default(),
        };
        let status = |path: &str, paths: Paths| {
            answer(&Request::get(path).body(()).expect("a request"), paths, &sources).status()
        };
        for path in ["/status", "/metrics", "/drops", "/connections"] {
            assert_eq!(status(path, Paths::Health), StatusCode::NOT_FOUND, "{path}");
        }
        assert_eq!(status("/healthz", Paths::Health), StatusCode::OK);
        assert_eq!(status("/readyz", Paths::Health), StatusCode::SERVICE_UNAVAILABLE, "no topology yet");
        assert_eq!(status("/connections", Paths::All), StatusCode::OK);
    }
}
