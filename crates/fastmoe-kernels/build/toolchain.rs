//! Finding nvcc: a named folder, the packages of a Python environment, an installed CUDA toolkit.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::arch::Arch;

/// The oldest release that knows family targets and CUDA 13's image format.
const OLDEST: (u32, u32) = (13, 0);

pub struct Nvcc {
    pub path: PathBuf,
    /// What `nvcc --version` prints; part of what an image depends on.
    pub version: String,
}

/// The nvcc to use, or in a few words why there is none.
pub fn find() -> Result<Nvcc, String> {
    let path = match env::var_os("FASTMOE_NVCC_ROOT") {
        Some(root) => executable(Path::new(&root)).ok_or(format!("no bin/nvcc in FASTMOE_NVCC_ROOT={}", root.display()))?,
        None => python_root()
            .or(env::var_os("CUDA_HOME").map(PathBuf::from))
            .and_then(|root| executable(&root))
            .ok_or("no nvcc: install the nvidia packages that pyproject.toml lists, or set FASTMOE_NVCC_ROOT or CUDA_HOME")?,
    };
    let output = Command::new(&path)
        .arg("--version")
        .output()
        .map_err(|error| format!("{}: {error}", path.display()))?;
    let version = String::from_utf8_lossy(&output.stdout).into_owned();
    match release(&version) {
        Some(release) if release >= OLDEST => Ok(Nvcc { path, version }),
        Some((major, minor)) => {
            Err(format!("{} is CUDA {major}.{minor}, 13.0 or newer is needed", path.display()))
        }
        None => Err(format!("{} --version names no release", path.display())),
    }
}

fn executable(root: &Path) -> Option<PathBuf> {
    Some(root.join("bin/nvcc")).filter(|path| path.is_file())
}

/// `site-packages/nvidia/cu13` of the Python environment that builds.
fn python_root() -> Option<PathBuf> {
    const SCRIPT: &str = "import nvidia, pathlib
for folder in nvidia.__path__:
    root = pathlib.Path(folder, 'cu13')
    if (root / 'bin/nvcc').is_file():
        print(root)
        break";
    let environment = env::var_os("VIRTUAL_ENV").map(|root| Path::new(&root).join("bin/python"));
    let pythons = [environment, env::var_os("PYO3_PYTHON").map(PathBuf::from), Some("python3".into())];
    pythons.into_iter().flatten().find_map(|python| {
        let output = Command::new(python).args(["-c", SCRIPT]).output().ok()?;
        let root = String::from_utf8(output.stdout).ok()?;
        (!root.is_empty()).then(|| PathBuf::from(root.trim_end()))
    })
}

/// 13 and 0 of `Cuda compilation tools, release 13.0, V13.0.88`.
fn release(version: &str) -> Option<(u32, u32)> {
    let (major, rest) = version.split_once("release ")?.1.split_once('.')?;
    let minor = rest.split_once(',')?.0;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The targets of this machine's GPUs.
pub fn native() -> Vec<Arch> {
    let query =
        Command::new("nvidia-smi").args(["--query-gpu=compute_cap", "--format=csv,noheader"]).output();
    let listed = query.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let device = |line: &str| {
        let (major, minor) = line.trim().split_once('.')?;
        Arch::of_device(major.parse().ok()?, minor.parse().ok()?)
    };
    listed.lines().filter_map(device).collect()
}
