//! Reads the server name of a TLS ClientHello (RFC 6066 §3) with rustls' parser. The bytes are kept for the node that
//! answers the handshake; TLS is not terminated here.

use std::io::Cursor;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio_rustls::rustls::server::Acceptor;

use super::limits;

/// Fatal TLS alerts (RFC 8446 §6.2), each as a complete record. This one: no node has the requested name.
pub(super) const UNRECOGNIZED_NAME: [u8; 7] = alert(112);
/// The node is unreachable.
pub(super) const INTERNAL_ERROR: [u8; 7] = alert(80);
/// The client does not speak TLS.
pub(super) const DECODE_ERROR: [u8; 7] = alert(50);

const fn alert(description: u8) -> [u8; 7] {
    [21, 3, 3, 0, 2, 2, description]
}

/// The first message of a TLS client.
#[derive(Debug)]
pub(crate) struct ClientHello {
    /// Server name in lower case, if the client sent one. Go sends none when it dials an address.
    pub(crate) name: Option<String>,
    /// All bytes received so far.
    pub(crate) bytes: Vec<u8>,
}

/// Why no ClientHello was read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The bytes are not TLS.
    #[error("not a TLS ClientHello: {0}")]
    Malformed(String),
    /// It exceeds the limit.
    #[error("the ClientHello exceeds {} bytes", limits::CLIENT_HELLO)]
    TooLong,
    /// The client closed the connection.
    #[error("the client closed the connection before its ClientHello was complete")]
    Ended,
    /// The connection failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Reads a ClientHello that may arrive in several segments.
pub(crate) async fn read(client: &mut (impl AsyncRead + Unpin)) -> Result<ClientHello, Error> {
    let mut parser = Parser::default();
    let mut bytes = Vec::with_capacity(2048);
    loop {
        let before = bytes.len();
        if client.read_buf(&mut bytes).await? == 0 {
            return Err(Error::Ended);
        }
        if let Some(name) = parser.take(&bytes[before..])? {
            return Ok(ClientHello { name, bytes });
        }
        if bytes.len() > limits::CLIENT_HELLO {
            return Err(Error::TooLong);
        }
    }
}

#[derive(Default)]
struct Parser {
    acceptor: Acceptor,
}

impl Parser {
    /// Takes more bytes. `None` while the message is incomplete; then the server name, if the client sent one.
    fn take(&mut self, bytes: &[u8]) -> Result<Option<Option<String>>, Error> {
        let mut rest = Cursor::new(bytes);
        while (rest.position() as usize) < bytes.len() {
            // 0: its buffer is full, and `accept` reports the error.
            if self.acceptor.read_tls(&mut rest).map_err(|e| Error::Malformed(e.to_string()))? == 0 {
                break;
            }
        }
        match self.acceptor.accept() {
            Ok(Some(accepted)) => Ok(Some(accepted.client_hello().server_name().map(str::to_ascii_lowercase))),
            Ok(None) => Ok(None),
            Err((e, _)) => Err(Error::Malformed(e.to_string())),
        }
    }
}

/// True if these segments form a complete ClientHello; for the fuzz target.
pub fn is_client_hello(segments: &[&[u8]]) -> bool {
    let mut parser = Parser::default();
    for segment in segments {
        match parser.take(segment) {
            Ok(Some(_)) => return true,
            Ok(None) => {}
            Err(_) => return false,
        }
    }
    false
}
