//! Accepts TCP connections through a lack of file descriptors.

use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

/// Returns the next connection. Errors are logged, with `what` as the name of the connection. Safe to cancel.
pub(crate) async fn accept(listener: &TcpListener, what: &str) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(e) => {
                // Usually a lack of file descriptors: an immediate retry would only consume CPU time.
                tracing::warn!(error = %e, "cannot accept {what}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}
