//! Which node a TLS client wants: the server name of its ClientHello (RFC 6066 §3), read by rustls's own parser. The bytes are kept, for
//! the node that answers it; TLS is not opened.

use std::io::Cursor;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio_rustls::rustls::server::Acceptor;

use super::limits;

/// Alerts of TLS (RFC 8446 §6.2) as what they are on the wire: a record of its own, fatal.
pub(super) const UNRECOGNIZED_NAME: [u8; 7] = alert(112);
/// The node is not to be had.
pub(super) const INTERNAL_ERROR: [u8; 7] = alert(80);
/// Not TLS.
pub(super) const DECODE_ERROR: [u8; 7] = alert(50);

const fn alert(description: u8) -> [u8; 7] {
    [21, 3, 3, 0, 2, 2, description]
}

/// What a client said first.
#[derive(Debug)]
pub(crate) struct Hello {
    /// The name that it gave, lower case; Go gives none for an address.
    pub(crate) name: Option<String>,
    /// All that it has sent so far.
    pub(crate) bytes: Vec<u8>,
}

/// Why there is no hello.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// It is no TLS.
    #[error("no TLS ClientHello: {0}")]
    Malformed(String),
    /// It goes on for ever.
    #[error("a ClientHello of more than {} bytes", limits::HELLO)]
    TooLong,
    /// The client went away.
    #[error("the client went away in the middle of its ClientHello")]
    Ended,
    /// The connection broke.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Reads a ClientHello, in however many pieces it comes.
pub(crate) async fn read(client: &mut (impl AsyncRead + Unpin)) -> Result<Hello, Error> {
    let mut parser = Parser::default();
    let mut bytes = Vec::with_capacity(2048);
    loop {
        let before = bytes.len();
        if client.read_buf(&mut bytes).await? == 0 {
            return Err(Error::Ended);
        }
        if let Some(name) = parser.take(&bytes[before..])? {
            return Ok(Hello { name, bytes });
        }
        if bytes.len() > limits::HELLO {
            return Err(Error::TooLong);
        }
    }
}

/// The parser by itself, for bytes that are there.
#[derive(Default)]
struct Parser {
    acceptor: Acceptor,
}

impl Parser {
    /// Takes more bytes. `None`: not complete yet; else the name, if the client gives one.
    fn take(&mut self, bytes: &[u8]) -> Result<Option<Option<String>>, Error> {
        let mut rest = Cursor::new(bytes);
        while (rest.position() as usize) < bytes.len() {
            // What it does not take is too much for it.
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

/// For the fuzzer: true if these pieces are a ClientHello.
pub fn is_hello(pieces: &[&[u8]]) -> bool {
    let mut parser = Parser::default();
    for piece in pieces {
        match parser.take(piece) {
            Ok(Some(_)) => return true,
            Ok(None) => {}
            Err(_) => return false,
        }
    }
    false
}
