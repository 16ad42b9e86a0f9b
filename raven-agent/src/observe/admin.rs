//! HTTP for machines: `/metrics`, `/drops` and `/tunnels` on one address, `/healthz` and `/readyz` on another.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use http_body_util::Full;
use hyper::{Request, Response, StatusCode, body::Bytes, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::watch};

use super::{Drops, metrics, publish::Latest};
use crate::proxy::stats::Stats;

/// How long a client may take to say what it wants.
const HEAD: Duration = Duration::from_secs(5);

/// A run takes seconds, and the next one comes within half a minute: one that has not ended by then waits for what will never come.
/// Starting anew costs no packet.
const STUCK: Duration = Duration::from_secs(300);

/// Serves all paths on `address` until the process ends. An address that is taken is logged: no reason not to forward.
pub async fn serve(address: SocketAddr, latest: watch::Receiver<Latest>, drops: Drops, proxy: Stats) {
    let listener = match bind(address).await {
        Ok(listener) => listener,
        Err(e) => return tracing::error!("listen on {address}: {e}; metrics and health are not served there"),
    };
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of file descriptors, mostly: those of others will end.
                tracing::warn!("accept on {address}: {e}");
                tokio::time::sleep(HEAD).await;
                continue;
            }
        };
        let (latest, drops, proxy) = (latest.clone(), drops.clone(), proxy.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let response = answer(&request, &latest, &drops, &proxy);
                async move { Ok::<_, Infallible>(response) }
            });
            let mut builder = http1::Builder::new();
            builder.timer(TokioTimer::new()).header_read_timeout(HEAD).keep_alive(false);
            // A client that goes away early is its own business.
            let _ = builder.serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

/// `[::]` needs IPv6 in the kernel; without it, all of IPv4.
async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(_) if address.ip().is_unspecified() && address.is_ipv6() => TcpListener::bind(("0.0.0.0", address.port())).await,
        result => result,
    }
}

fn answer<B>(request: &Request<B>, latest: &watch::Receiver<Latest>, drops: &Drops, proxy: &Stats) -> Response<Full<Bytes>> {
    let report = latest.borrow().as_ref().map(|(report, _)| report.clone());
    match request.uri().path() {
        "/healthz" => health(report.map(|r| r.ended.elapsed())),
        "/readyz" => match report {
            None => text(StatusCode::SERVICE_UNAVAILABLE, "waiting for the topology\n".to_owned()),
            Some(r) if r.failures.is_empty() => text(StatusCode::OK, "ok\n".to_owned()),
            Some(r) => text(StatusCode::SERVICE_UNAVAILABLE, r.failures.join("\n") + "\n"),
        },
        "/metrics" => match metrics::render(report.as_deref(), proxy) {
            Ok(metrics) => text(StatusCode::OK, metrics),
            Err(e) => text(StatusCode::INTERNAL_SERVER_ERROR, e),
        },
        "/tunnels" => text(StatusCode::OK, proxy.tunnels()),
        "/drops" => text(StatusCode::OK, drops.render(report.as_deref())),
        _ => text(StatusCode::NOT_FOUND, "not here: /metrics, /drops, /tunnels, /healthz, /readyz\n".to_owned()),
    }
}

/// `age`: since the last run ended, if there was one.
fn health(age: Option<Duration>) -> Response<Full<Bytes>> {
    match age.filter(|age| *age > STUCK) {
        None => text(StatusCode::OK, "ok\n".to_owned()),
        Some(age) => text(StatusCode::SERVICE_UNAVAILABLE, format!("no run has ended for {} s: start me anew\n", age.as_secs())),
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
    fn an_agent_whose_run_does_not_end_is_not_healthy() {
        assert_eq!(health(None).status(), StatusCode::OK, "it waits for the first topology");
        assert_eq!(health(Some(Duration::from_secs(60))).status(), StatusCode::OK);
        assert_eq!(health(Some(STUCK + Duration::from_secs(1))).status(), StatusCode::SERVICE_UNAVAILABLE);
    }
}
