//! Konnectivity beside the tunnel: its server on a cloud node, its agent at a site, certificates of its own. Only where
//! `proxy-server` and
//! `proxy-agent` are on PATH; nothing of the lab needs it.

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
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};

/// Where its agents dial the server.
pub const AGENT_PORT: u16 = 8132;

/// Both programs, running.
pub struct Konnectivity {
    server: Process,
    agent: Process,
    socket: PathBuf,
}

/// A way to an address at the site.
#[derive(Clone, Debug)]
pub struct Way {
    socket: PathBuf,
    target: SocketAddr,
}

impl Konnectivity {
    /// Starts both; `None` where one of them is not on PATH.
    pub fn start(lab: &Lab, cloud: &str, edge: &str) -> Result<Option<Self>> {
        let (Some(server), Some(agent)) = (on_path("proxy-server"), on_path("proxy-agent")) else { return Ok(None) };
        let dir = lab.site().dir.join("konnectivity");
        fs::create_dir_all(&dir)?;
        let public = lab.cloud().public_v4.to_string();
        certificates(&dir, &public)?;
        let file = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let socket = dir.join("server.sock");
        let mut command = lab.node(cloud).ns.command(server);
        command.args(["--mode=http-connect", "--server-port=0", "--server-count=1", "--admin-port=18133", "--health-port=18134"]);
        command.arg(format!("--uds-name={}", socket.display())).arg(format!("--agent-port={AGENT_PORT}"));
        command.args(["--cluster-ca-cert", &file("ca.crt"), "--cluster-cert", &file("server.crt"), "--cluster-key", &file("server.key")]);
        let server = Process::start("proxy-server", &lab.logs(), command)?;
        let mut command = lab.node(edge).ns.command(agent);
        command.arg(format!("--proxy-server-host={public}")).arg(format!("--proxy-server-port={AGENT_PORT}"));
        command.args(["--ca-cert", &file("ca.crt"), "--agent-cert", &file("agent.crt"), "--agent-key", &file("agent.key")]);
        command.args(["--admin-server-port=18133", "--health-server-port=18134"]);
        let agent = Process::start("proxy-agent", &lab.logs(), command)?;
        Ok(Some(Self { server, agent, socket }))
    }

    /// The way to `target`.
    pub fn way(&self, target: SocketAddr) -> Way {
        Way { socket: self.socket.clone(), target }
    }

    /// Both processes.
    pub fn pids(&self) -> Vec<u32> {
        vec![self.server.pid(), self.agent.pid()]
    }
}

impl Way {
    /// Opens a connection.
    pub fn connect(&self, patience: Duration) -> Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(patience))?;
        write!(stream, "CONNECT {0} HTTP/1.1\r\nHost: {0}\r\n\r\n", self.target)?;
        // Its answer ends with an empty line, and nothing follows before we ask.
        let mut answer = BufReader::new(&stream).lines();
        let status = answer.next().context("an answer")??;
        ensure!(status.contains(" 200 "), "it says {status:?}");
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
    for (name, usage) in [("server", ExtendedKeyUsagePurpose::ServerAuth), ("agent", ExtendedKeyUsagePurpose::ClientAuth)] {
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
