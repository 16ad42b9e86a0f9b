//! Accepts client requests on a cloud gateway node: TLS by the server name in the ClientHello or by the dialled
//! address, plain HTTP by Host header or `?nodeName=` ([`super::http`]). A client whose target is unknown gets an error
//! at once, in its own protocol.

use std::net::SocketAddr;

use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tracing::Instrument;

use super::{
    client_hello::{self, DECODE_ERROR, INTERNAL_ERROR, UNRECOGNIZED_NAME},
    http, limits,
    pending::{PendingSet, PendingSlot},
    router::{Router, refusal_of},
    stats::Refusal,
    stream::{self, Stream},
};
use crate::plan::proxy::{ByName, Target};

/// Accepts client connections; clones share the router.
#[derive(Clone)]
pub(crate) struct Ingress(pub(crate) Router);

/// How a listener finds the target of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// By the name in it.
    Named(ByName),
    /// By the dialled address, whatever the protocol: an intercepted connection.
    Intercepted,
}

impl Ingress {
    /// Accepts connections until the task is dropped.
    pub(crate) async fn run(self, listener: TcpListener, kind: Kind) {
        let pending = PendingSet::new(limits::PENDING_CLIENTS);
        // All connections end with this task: a half that is switched off carries no traffic.
        let mut tasks = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = tasks.join_next() => continue,
            };
            let (client, from) = match accepted {
                Ok(accepted) => accepted,
                Err(e) => {
                    // Usually the limit of open files; it passes when connections end.
                    tracing::warn!(error = %e, "cannot accept client connections; retrying");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            };
            let from = SocketAddr::new(from.ip().to_canonical(), from.port());
            let (slot, evicted) = pending.enter(from.ip());
            if evicted && self.0.stats.refused(Refusal::TooMany) {
                tracing::warn!(
                    limit = limits::PENDING_CLIENTS,
                    "too many pending client connections; evicted the oldest one of the client with most"
                );
            }
            let ingress = self.clone();
            tasks.spawn(async move {
                stream::prepare(&client);
                match kind {
                    Kind::Named(by) => ingress.named(client, from, by, slot).await,
                    Kind::Intercepted => ingress.intercepted(client, from, slot).await,
                }
            });
        }
    }

    async fn named(self, client: TcpStream, from: SocketAddr, by: ByName, slot: PendingSlot) {
        match by {
            ByName::Tls(port) => self.secure(client, from, port, slot).await,
            ByName::Plain => http::serve(self.0, client, from.ip(), slot).await,
        }
    }

    async fn secure(&self, mut client: TcpStream, from: SocketAddr, port: u16, slot: PendingSlot) {
        let hello = tokio::select! {
            hello = timeout(limits::HEAD, client_hello::read(&mut client)) => hello,
            () = slot.evicted.cancelled() => return,
        };
        let hello = match hello {
            Ok(Ok(hello)) => hello,
            Ok(Err(e)) => {
                return self.refuse(&mut client, from, Refusal::Malformed, &DECODE_ERROR, &e.to_string()).await;
            }
            Err(_) => return self.refuse(&mut client, from, Refusal::Slow, &[], "the ClientHello timed out").await,
        };
        drop(slot);
        let Some(name) = hello.name else {
            let error = "the ClientHello has no server name (clients send none for an address); dial the node's own address instead";
            return self.refuse(&mut client, from, Refusal::NoName, &UNRECOGNIZED_NAME, error).await;
        };
        let found = self.0.plan.borrow().directory.by_name(&name, port).cloned();
        match found {
            Ok(target) => self.connect(client, from, &target, port, &hello.bytes).await,
            Err(e) => self.refuse(&mut client, from, refusal_of(&e), &UNRECOGNIZED_NAME, &e.to_string()).await,
        }
    }

    /// The dialled address determines the node; the bytes are not inspected. A request to a proxy of another exposed pool is
    /// answered as that proxy would.
    async fn intercepted(self, mut client: TcpStream, from: SocketAddr, slot: PendingSlot) {
        let Ok(to) = client.local_addr() else { return };
        let by = self.0.plan.borrow().directory.service_port(to.ip().to_canonical(), to.port());
        if let Some(by) = by {
            return self.named(client, from, by, slot).await;
        }
        // In TLS and HTTP the client sends first. A silent client occupies a pending slot, which can be evicted, and
        // not a stream of the site.
        let mut byte = [0];
        let first = tokio::select! {
            first = timeout(limits::HEAD, client.peek(&mut byte)) => first,
            () = slot.evicted.cancelled() => return,
        };
        match first {
            Ok(Ok(n)) if n > 0 => drop(slot),
            Ok(_) => return,
            Err(_) => {
                return self.refuse(&mut client, from, Refusal::Slow, &[], "the client sent no byte in time").await;
            }
        }
        let found = self.0.plan.borrow().directory.by_address(to.ip().to_canonical(), to.port()).cloned();
        match found {
            Ok(target) => self.connect(client, from, &target, to.port(), &[]).await,
            Err(e) => {
                let response = self.error_response(to.port(), "404 Not Found", &e.to_string());
                self.refuse(&mut client, from, refusal_of(&e), &response, &e.to_string()).await;
            }
        }
    }

    /// An error in the protocol of this port: an HTTP response or a TLS alert.
    fn error_response(&self, port: u16, status: &str, error: &str) -> Vec<u8> {
        if !self.0.plan.borrow().directory.ports.http.contains(&port) {
            return INTERNAL_ERROR.to_vec();
        }
        let body = format!("raven: {error}\n");
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
        .into_bytes()
    }

    async fn connect(&self, mut client: TcpStream, from: SocketAddr, target: &Target, port: u16, first: &[u8]) {
        let stream = Stream { id: self.0.stats.next_id(), node: target.node.clone(), port };
        let span = stream.span();
        let carried = async {
            match self.0.open(target, &stream, from.ip()).await {
                Ok(node) => stream::carry(stream, client, node.into_io(), first, &self.0.stats).await,
                Err((refusal, error)) => {
                    let response = self.error_response(port, "502 Bad Gateway", &error);
                    self.refuse(&mut client, from, refusal, &response, &error).await;
                }
            }
        };
        carried.instrument(span).await;
    }

    async fn refuse(&self, client: &mut TcpStream, from: SocketAddr, refusal: Refusal, response: &[u8], error: &str) {
        if self.0.stats.refused(refusal) {
            tracing::warn!(%from, reason = refusal.as_str(), error, "refused a request");
        }
        let _ = client.write_all(response).await;
        let _ = client.shutdown().await;
    }
}
