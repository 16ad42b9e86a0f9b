//! The lab's Kubernetes: etcd and kube-apiserver in the control plane's namespace, and the objects that Raven reads.
//!
//! [`binaries`] finds or builds the programs, `certificates` creates CA and certificates, [`objects`] writes Nodes and
//! Gateways as kubelets and users would, [`identity`] creates the tokens of agents and controller.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kube::api::{GetParams, Request};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use crate::eventually;
use crate::namespace::{Namespace, output};
use crate::process::Process;
use crate::site::{API_PORT, CONTROL_PLANE, CONTROL_PLANE_V6, Node, Site};
use binaries::Binaries;
use certificates::Certificates;

pub mod binaries;
mod certificates;
pub mod identity;
pub mod objects;

/// IPv4 and IPv6 range of Service addresses.
pub const SERVICES: &str = "10.96.0.0/16,fd00:96::/112";
/// Address of the Service `kubernetes`, the first one of the range.
pub(crate) const FIRST_SERVICE: &str = "10.96.0.1";
const READY_WITHIN: Duration = Duration::from_secs(60);

/// A running API server with its etcd.
pub struct Cluster {
    binaries: Binaries,
    certificates: Certificates,
    kubeconfig: PathBuf,
    client: Client,
    etcd: Process,
    api_server: Process,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("kubeconfig", &self.kubeconfig).finish_non_exhaustive()
    }
}

impl Cluster {
    /// Starts etcd and the API server, waits until it is ready, applies CRDs and manifests if `crds` is set,
    /// and writes the Nodes.
    pub(crate) async fn start(site: &Site, crds: bool) -> Result<Self> {
        let binaries = tokio::task::spawn_blocking(Binaries::find_or_build).await??;
        let dir = site.dir.join("kubernetes");
        fs::create_dir_all(&dir)?;
        let public = [site.cloud().public_v4.to_string(), site.cloud().public_v6.to_string()];
        let cloud = site.nodes_of(&site.cloud().spec.name).map(|node| node.lan_v4.to_string());
        let names = [
            CONTROL_PLANE.to_string(),
            CONTROL_PLANE_V6.to_string(),
            site.host_link.control_plane.to_string(),
            "127.0.0.1".to_owned(),
            FIRST_SERVICE.to_owned(),
            "kubernetes.default.svc".to_owned(),
        ];
        let certificates = Certificates::make(&dir, names.into_iter().chain(public).chain(cloud).collect())?;
        let kubeconfig = site.dir.join("kubeconfig");
        let server = format!("https://{}:{API_PORT}", site.host_link.control_plane);
        fs::write(&kubeconfig, certificates.admin_kubeconfig(&server))?;
        let etcd = Process::start("etcd", &site.logs(), etcd(site, &binaries, &dir))?;
        let api_server = Process::start("kube-apiserver", &site.logs(), api_server(site, &binaries, &dir))?;
        let client = client(&kubeconfig).await?;
        let mut cluster = Self { binaries, certificates, kubeconfig, client, etcd, api_server };
        cluster.ready().await?;
        if crds {
            cluster.apply_crds().await?;
            cluster.apply_manifests()?;
        }
        cluster.apply_nodes(site).await?;
        if crds {
            identity::policy_in_force(&cluster).await?;
        }
        Ok(cluster)
    }

    /// Signs a serving certificate by the CA that API servers use for kubelets. Returns certificate and key (PEM).
    pub fn sign_server(&self, name: &str, names: Vec<String>) -> Result<(String, String)> {
        self.certificates.sign_server(name, names)
    }

    /// Returns the path of a file of the control plane's certificates.
    pub fn file(&self, name: &str) -> PathBuf {
        self.kubeconfig.with_file_name("kubernetes").join(name)
    }

    /// Returns the administrator's kubeconfig for a server's URL.
    pub fn admin_kubeconfig(&self, server: &str) -> String {
        self.certificates.admin_kubeconfig(server)
    }

    /// Returns the URL by which a node reaches the API server.
    pub fn server_for(&self, site: &Site, node: &Node) -> String {
        let cloud = site.cloud();
        let (ipv4, ipv6) = match node.pool == cloud.spec.name {
            true => (CONTROL_PLANE, CONTROL_PLANE_V6),
            false => (cloud.public_v4, cloud.public_v6),
        };
        let address = if node.ipv6_only { IpAddr::V6(ipv6) } else { IpAddr::V4(ipv4) };
        format!("https://{}", SocketAddr::new(address, API_PORT))
    }

    /// Returns the path of kubectl.
    pub fn kubectl_program(&self) -> PathBuf {
        self.binaries.kubectl.clone()
    }

    /// Returns the command of a further API server on the same etcd.
    pub fn api_server_at(&self, ns: &Namespace, address: std::net::Ipv4Addr, port: u16, run: &Path) -> Command {
        let etcd = format!("http://{CONTROL_PLANE}:2379");
        api_server_command(
            ns.command(&self.binaries.api_server),
            &etcd,
            address,
            port,
            &self.kubeconfig.with_file_name("kubernetes"),
            run,
        )
    }

    /// Returns a client with all permissions.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Returns the path of the administrator's kubeconfig, which works on this machine and in
    /// the control plane's namespace.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Describes where the programs come from.
    pub fn origin(&self) -> &str {
        &self.binaries.origin
    }

    /// Runs kubectl as the administrator and returns its standard output.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.binaries.kubectl);
        command.arg("--kubeconfig").arg(&self.kubeconfig).args(args);
        command.env("KUBECACHEDIR", self.kubeconfig.with_file_name("kubectl-cache")).env("NO_PROXY", "169.254.0.0/16");
        output(&mut command)
    }

    /// Kills the API server with SIGKILL. [`Cluster::start_api_server`] starts it again.
    pub fn kill_api_server(&mut self) -> Result<()> {
        self.api_server.kill()
    }

    /// Starts the API server again and waits until it is ready.
    pub async fn start_api_server(&mut self, site: &Site) -> Result<()> {
        let command = api_server(site, &self.binaries, &site.dir.join("kubernetes"));
        self.api_server = Process::start("kube-apiserver", &site.logs(), command)?;
        self.ready().await
    }

    async fn ready(&mut self) -> Result<()> {
        let client = self.client.clone();
        let (etcd, api_server) = (&mut self.etcd, &mut self.api_server);
        // If a server exits at its start, fail immediately instead of at the deadline.
        let mut running = || etcd.ensure_running().and_then(|()| api_server.ensure_running());
        eventually(READY_WITHIN, "the API server is ready", || {
            let (client, alive) = (client.clone(), running());
            async move {
                if let Err(error) = alive {
                    return Ok(Err(error));
                }
                let request = Request::new("").get("readyz", &GetParams::default())?;
                let answer = client.request_text(request).await?;
                if answer == "ok" { Ok(Ok(())) } else { bail!("/readyz: {answer}") }
            }
        })
        .await?
    }
}

fn etcd(site: &Site, binaries: &Binaries, dir: &Path) -> Command {
    let mut command = site.control_plane.command(&binaries.etcd);
    command.arg("--data-dir").arg(dir.join("etcd"));
    // Lab data need not survive a power cut; without fsync the API server is ready in a second.
    command.args(["--unsafe-no-fsync", "--log-level=warn"]);
    // The second URL is for API servers on other nodes of the cloud.
    command.arg(format!("--listen-client-urls=http://127.0.0.1:2379,http://{CONTROL_PLANE}:2379"));
    command.arg("--advertise-client-urls=http://127.0.0.1:2379");
    command.args(["--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380"]);
    command.arg("--initial-cluster=default=http://127.0.0.1:2380");
    command
}

fn api_server(site: &Site, binaries: &Binaries, dir: &Path) -> Command {
    let command = site.control_plane.command(&binaries.api_server);
    api_server_command(command, "http://127.0.0.1:2379", CONTROL_PLANE, API_PORT, dir, &dir.join("run"))
}

fn api_server_command(
    mut command: Command,
    etcd: &str,
    address: std::net::Ipv4Addr,
    port: u16,
    dir: &Path,
    run: &Path,
) -> Command {
    let file = |flag: &str, name: &str| format!("--{flag}={}", dir.join(name).display());
    command.args([
        format!("--etcd-servers={etcd}"),
        format!("--advertise-address={address}"),
        format!("--secure-port={port}"),
        format!("--service-cluster-ip-range={SERVICES}"),
        "--authorization-mode=RBAC".to_owned(),
        "--allow-privileged".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--cert-dir={}", run.display()),
        file("tls-cert-file", "server.crt"),
        file("tls-private-key-file", "server.key"),
        file("client-ca-file", "ca.crt"),
        file("kubelet-certificate-authority", "ca.crt"),
        file("kubelet-client-certificate", "kubelet-client.crt"),
        file("kubelet-client-key", "kubelet-client.key"),
        // Client certificate towards aggregated API servers, which is metrics-server.
        file("proxy-client-cert-file", "kubelet-client.crt"),
        file("proxy-client-key-file", "kubelet-client.key"),
        file("requestheader-client-ca-file", "ca.crt"),
        format!("--requestheader-allowed-names={}", certificates::KUBELET_CLIENT),
        "--requestheader-username-headers=X-Remote-User".to_owned(),
        "--requestheader-group-headers=X-Remote-Group".to_owned(),
        "--requestheader-extra-headers-prefix=X-Remote-Extra-".to_owned(),
        file("service-account-key-file", "service-account.pub"),
        file("service-account-signing-key-file", "service-account.key"),
    ]);
    command
}

/// Returns a client for a kubeconfig file.
pub async fn client(kubeconfig: &Path) -> Result<Client> {
    Ok(Client::try_from(config(kubeconfig).await?)?)
}

async fn config(kubeconfig: &Path) -> Result<Config> {
    let file = Kubeconfig::read_from(kubeconfig).with_context(|| format!("read {}", kubeconfig.display()))?;
    Ok(Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?)
}
