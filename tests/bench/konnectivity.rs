//! Runs Konnectivity for comparison: its server on a cloud node and its agent at a site, with separate certificates.
//! Optional: requires `proxy-server` and `proxy-agent` on PATH.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use raven_tests::{Lab, process::Process};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

/// Port of the server for agents.
pub(crate) const AGENT_PORT: u16 = 8132;

/// A running server with its agent.
pub(crate) struct Konnectivity {
    server: Process,
    agent: Process,
    socket: PathBuf,
}

/// Opens connections to an address at the site.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    socket: PathBuf,
    target: SocketAddr,
}

impl Konnectivity {
    /// Starts both programs. Returns `None` if one of them is not on PATH.
    pub(crate) fn start(lab: &Lab, cloud: &str, edge: &str) -> Result<Option<Self>> {
        let (Some(server), Some(agent)) = (on_path("proxy-server"), on_path("proxy-agent")) else { return Ok(None) };
        let dir = lab.site().dir.join("konnectivity");
        fs::create_dir_all(&dir)?;
        let public = lab.cloud().public_v4.to_string();
        certificates(&dir, &public)?;
        let file = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let socket = dir.join("server.sock");
        let mut command = lab.node(cloud).ns.command(server);
        command.args([
            "--mode=http-connect",
            "--server-port=0",
            "--server-count=1",
            "--admin-port=18133",
            "--health-port=18134",
        ]);
        command.arg(format!("--uds-name={}", socket.display())).arg(format!("--agent-port={AGENT_PORT}"));
        command.args([
            "--cluster-ca-cert",
            &file("ca.crt"),
            "--cluster-cert",
            &file("server.crt"),
            "--cluster-key",
            &file("server.key"),
        ]);
        let server = Process::start("proxy-server", &lab.logs(), command)?;
        let mut command = lab.node(edge).ns.command(agent);
        command.arg(format!("--proxy-server-host={public}")).arg(format!("--proxy-server-port={AGENT_PORT}"));
        command.args([
            "--ca-cert",
            &file("ca.crt"),
            "--agent-cert",
            &file("agent.crt"),
            "--agent-key",
            &file("agent.key"),
        ]);
        command.args(["--admin-server-port=18133", "--health-server-port=18134"]);
        let agent = Process::start("proxy-agent", &lab.logs(), command)?;
        Ok(Some(Self { server, agent, socket }))
    }

    /// Returns a connector to `target`.
    pub(crate) fn connector(&self, target: SocketAddr) -> Connector {
        Connector { socket: self.socket.clone(), target }
    }

    /// Returns the process IDs of server and agent.
    pub(crate) fn pids(&self) -> Vec<u32> {
        vec![self.server.pid(), self.agent.pid()]
    }
}

impl Connector {
    /// Opens a connection; `timeout` applies to each read.
    pub(crate) fn connect(&self, timeout: Duration) -> Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(timeout))?;
        write!(stream, "CONNECT {0} HTTP/1.1\r\nHost: {0}\r\n\r\n", self.target)?;
        // The response ends with an empty line, and the server sends nothing more before a request.
        let mut answer = BufReader::new(&stream).lines();
        let status = answer.next().context("the server closed the connection without a response")??;
        ensure!(status.contains(" 200 "), "the server responds {status:?}");
        for line in answer {
            if line?.is_empty() {
                break;
            }
        }
        Ok(stream)
    }
}

fn certificates(dir: &Path, server: &str) -> Result<()> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    fs::write(dir.join("ca.crt"), params.self_signed(&key)?.pem())?;
    let issuer = Issuer::new(params, key);
    for (name, usage) in
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("agent", ExtendedKeyUsagePurpose::ClientAuth)]
    {
        let mut params = CertificateParams::new(vec![server.to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate()?;
        fs::write(dir.join(format!("{name}.crt")), params.signed_by(&key, &issuer)?.pem())?;
        fs::write(dir.join(format!("{name}.key")), key.serialize_pem())?;
    }
    Ok(())
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.is_file())
}
