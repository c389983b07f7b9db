//! Compiling one kernel family, or finding that it has been compiled.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::arch::Arch;
use crate::ptxas::{self, Kernel};
use crate::toolchain::Nvcc;

const TO_PTX: &[&str] = &["-ptx", "-std=c++17", "-Werror=all-warnings"];
const TO_CUBIN: &[&str] = &["-cubin", "-Xptxas=-v"];
/// The effort of zstd, at most 22.
const ZSTD_LEVEL: i32 = 19;

/// Machine code or PTX of a family, compressed, in a file of the cache.
pub struct Image {
    pub family: String,
    pub arch: Arch,
    pub path: PathBuf,
    pub kernels: Vec<Kernel>,
}

pub struct Compiler<'a> {
    pub nvcc: &'a Nvcc,
    /// The folder `cuda/`.
    pub sources: &'a Path,
    /// Keeps `<family>.<code>.ptx`, `.cubin`, both compressed, the `.log` of ptxas, and in `.key` the hash of all that
    /// they were made from.
    pub cache: &'a Path,
}

impl Compiler<'_> {
    /// The images of a family with this [`code`](Arch::code).
    pub fn images(&self, family: &str, code: &str) -> Result<Vec<Image>, String> {
        let source = self.sources.join(format!("kernels/{family}.cu"));
        let file = |extension: &str| self.cache.join(format!("{family}.{code}.{extension}"));
        let key = self.key(&source)?;
        if fs::read_to_string(file("key")).is_ok_and(|found| found == key) {
            let kernels = ptxas::kernels(&text(&file("ptx"))?, &text(&file("log"))?)?;
            return Ok(listed(family, code, &kernels, file));
        }
        let _ = fs::remove_file(file("key"));
        self.nvcc(TO_PTX, &format!("compute_{code}"), &source, &file("ptx"))?;
        let log = self.nvcc(TO_CUBIN, &format!("sm_{code}"), &file("ptx"), &file("cubin"))?;
        write(&file("log"), log.as_bytes())?;
        let ptx = text(&file("ptx"))?;
        let kernels = ptxas::kernels(&ptx, &log)?;
        ptxas::refuse_local_memory(&kernels, &text(&source)?)
            .map_err(|error| format!("{family}, sm_{code}: {error}"))?;
        let images = listed(family, code, &kernels, file);
        for Image { arch, path, .. } in &images {
            let image = match arch {
                // The driver takes PTX as a C string.
                Arch::Ptx80 => format!("{ptx}\0").into_bytes(),
                _ => read(&file("cubin"))?,
            };
            write(path, &zstd::bulk::compress(&image, ZSTD_LEVEL).map_err(|error| error.to_string())?)?;
        }
        write(&file("key"), key.as_bytes())?;
        Ok(images)
    }

    /// Runs nvcc and returns what it says.
    fn nvcc(&self, flags: &[&str], target: &str, from: &Path, to: &Path) -> Result<String, String> {
        let mut command = Command::new(&self.nvcc.path);
        command
            .args(flags)
            .arg(format!("-arch={target}"))
            .arg("-I")
            .arg(self.sources)
            .arg("-o")
            .arg(to)
            .arg(from);
        let output = command.output().map_err(|error| format!("{}: {error}", self.nvcc.path.display()))?;
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        if output.status.success() { Ok(said) } else { Err(format!("{command:?} failed:\n{said}")) }
    }

    /// The hash of a source, of all it includes, of the compiler and its flags.
    fn key(&self, source: &Path) -> Result<String, String> {
        let mut hasher = DefaultHasher::new();
        (&self.nvcc.version, TO_PTX, TO_CUBIN, ZSTD_LEVEL).hash(&mut hasher);
        let mut seen = BTreeSet::new();
        let mut open = vec![source.to_owned()];
        while let Some(path) = open.pop() {
            let content = text(&path)?;
            content.hash(&mut hasher);
            let included =
                content.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.split('"').next());
            // Includes are relative to cuda/; what is not there comes with the toolkit or is the emulator's.
            let paths = included.map(|name| self.sources.join(name)).filter(|path| path.is_file());
            open.extend(paths.filter(|path| seen.insert(path.clone())));
        }
        Ok(format!("{:016x}", hasher.finish()))
    }
}

fn listed(family: &str, code: &str, kernels: &[Kernel], file: impl Fn(&str) -> PathBuf) -> Vec<Image> {
    let image = |arch: Arch| {
        let path = file(if arch == Arch::Ptx80 { "ptx.zst" } else { "cubin.zst" });
        Image { family: family.to_owned(), arch, path, kernels: kernels.to_vec() }
    };
    Arch::ALL.into_iter().filter(|arch| arch.code() == code).map(image).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn text(path: &Path) -> Result<String, String> {
    String::from_utf8(read(path)?).map_err(|error| format!("{}: {error}", path.display()))
}

fn write(path: &Path, content: &[u8]) -> Result<(), String> {
    fs::write(path, content).map_err(|error| format!("{}: {error}", path.display()))
}
