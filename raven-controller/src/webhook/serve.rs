//! HTTPS for the API server: `POST /convert`.
//!
//! Whoever can reach the port can post: what is answered depends on nothing but what was posted, so there is nothing to steal, and what
//! one request may cost is bounded.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use raven_api::schema::WEBHOOK_PATH;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_util::sync::CancellationToken;

use super::certificate::Material;
use super::convert;

// A list of all Gateways comes in one piece: a thousand of ten nodes each are 5 MB.
const LARGEST_BODY: usize = 32 << 20;
const CONNECTIONS: usize = 64;
// Conversions at a time: each holds a body and its objects.
const AT_ONCE: usize = 4;
const HANDSHAKE: Duration = Duration::from_secs(10);
// The API server gives up after 30 s.
const BODY: Duration = Duration::from_secs(30);
// Also how long an idle connection is kept: the API server keeps its own for 90 s.
const HEADER: Duration = Duration::from_secs(120);

/// Why the webhook cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The port is taken.
    #[error("listen on {address} for the conversion webhook: {source} (is another raven-controller running here? see --webhook-bind-addr)")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// TLS cannot be set up.
    #[error("set up TLS for the conversion webhook: {0}")]
    Tls(#[from] rustls::Error),
    /// The certificate of the Secret is none.
    #[error("read the webhook's certificate: {0}")]
    Pem(#[from] pem::Error),
}

/// What is served at present: held by [`keep`](super::keep), which replaces it without a pause.
pub type Identity = Option<Arc<CertifiedKey>>;

/// A certificate ready to serve.
pub fn identity(material: &Material) -> Result<Identity, Error> {
    let chain = CertificateDer::pem_slice_iter(material.certificate.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_slice(material.key.as_bytes())?;
    Ok(Some(Arc::new(CertifiedKey::from_der(chain, key, &ring::default_provider())?)))
}

#[derive(Debug)]
struct Present(watch::Receiver<Identity>);

impl ResolvesServerCert for Present {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.borrow().clone()
    }
}

/// The webhook's port.
pub struct Server {
    listener: TcpListener,
    tls: TlsAcceptor,
}

// === impl Server ===

impl Server {
    /// Opens the port; handshakes fail until there is an identity.
    pub async fn bind(address: SocketAddr, identity: watch::Receiver<Identity>) -> Result<Self, Error> {
        let provider = Arc::new(ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let config = config.with_no_client_auth().with_cert_resolver(Arc::new(Present(identity)));
        let listener = TcpListener::bind(address).await.map_err(|source| Error::Listen { address, source })?;
        Ok(Self { listener, tls: TlsAcceptor::from(Arc::new(config)) })
    }

    /// Answers until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let connections = Arc::new(Semaphore::new(CONNECTIONS));
        let conversions = Arc::new(Semaphore::new(AT_ONCE));
        loop {
            let Ok(place) = connections.clone().acquire_owned().await else { return };
            let stream = tokio::select! {
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(e) => {
                        // Out of file descriptors, mostly: at once again would only burn the processor.
                        tracing::warn!(error = %e, "accept a connection for the conversion webhook");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
                () = stop.cancelled() => return,
            };
            let (tls, conversions, stop) = (self.tls.clone(), conversions.clone(), stop.clone());
            tokio::spawn(async move {
                let _place = place;
                tokio::select! {
                    () = connection(stream, tls, conversions) => {}
                    () = stop.cancelled() => {}
                }
            });
        }
    }
}

async fn connection(stream: TcpStream, tls: TlsAcceptor, conversions: Arc<Semaphore>) {
    let stream = match timeout(HANDSHAKE, tls.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        // An API server that does not trust our CA yet says so in its own log; port scanners come by, too.
        Ok(Err(e)) => return tracing::debug!(error = %e, "TLS handshake of the conversion webhook"),
        Err(_) => return,
    };
    let service = service_fn(move |request| {
        let conversions = conversions.clone();
        async move { Ok::<_, Infallible>(respond(request, &conversions).await) }
    });
    let http = http1::Builder::new().timer(TokioTimer::new()).header_read_timeout(HEADER).serve_connection(TokioIo::new(stream), service);
    if let Err(e) = http.await {
        tracing::debug!(error = %e, "connection of the conversion webhook");
    }
}

async fn respond(request: Request<Incoming>, conversions: &Semaphore) -> Response<Full<Bytes>> {
    if request.uri().path() != WEBHOOK_PATH {
        return plain(StatusCode::NOT_FOUND, format!("see {WEBHOOK_PATH}\n"));
    }
    if request.method() != Method::POST {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "post a ConversionReview\n".to_owned());
    }
    let Ok(_turn) = conversions.acquire().await else {
        return plain(StatusCode::SERVICE_UNAVAILABLE, "stopping\n".to_owned());
    };
    let body = match timeout(BODY, Limited::new(request.into_body(), LARGEST_BODY).collect()).await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(e)) => return plain(StatusCode::PAYLOAD_TOO_LARGE, format!("read the ConversionReview: {e}\n")),
        Err(_) => return plain(StatusCode::REQUEST_TIMEOUT, "the ConversionReview took too long\n".to_owned()),
    };
    // A large list is work for milliseconds, which the elector must not wait for.
    let answer = tokio::task::spawn_blocking(move || convert::answer(&body).map(|review| serde_json::to_vec(&review))).await;
    match answer {
        Ok(Ok(Ok(bytes))) => {
            let mut response = Response::new(Full::new(Bytes::from(bytes)));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            response
        }
        Ok(Err(e)) => plain(StatusCode::BAD_REQUEST, format!("{e}\n")),
        Ok(Ok(Err(e))) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n")),
        Err(e) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{e}\n")),
    }
}

fn plain(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    response
}
