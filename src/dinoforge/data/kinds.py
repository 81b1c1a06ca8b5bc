"""Kinds of files, by their first bytes and by the ends of their names.

Nothing is decoded here. A file's name decides whether a folder's walk takes it (`EXTENSIONS`); its content is read
where that matters: for errors ("is an HTML page, not an image: …"), and for advice on files that were left out.
"""

import re
import zlib
from dataclasses import dataclass

EXTENSIONS: dict[str, tuple[str, ...]] = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif", "jfi", "jif"),
    "PNG": ("png",),
    "WebP": ("webp",),
    "TIFF": ("tif", "tiff", "btf", "tf2", "tf8"),
    "BMP": ("bmp",),
    "GIF": ("gif",),
    "JPEG 2000": ("jp2", "j2k", "jpx", "j2c", "jpc", "jpf"),
    "HEIC": ("heic", "heif", "hif"),
    "AVIF": ("avif",),
    "JPEG XL": ("jxl",),
    "Netpbm": ("ppm", "pgm", "pbm", "pnm"),
    "NumPy array": ("npy",),
}
"""The ends of names, in lower case, of the kinds of images that are taken from a folder."""

IMAGE_EXTENSIONS = frozenset(end for ends in EXTENSIONS.values() for end in ends)
"""The ends of the names that are taken from a folder, in lower case, without the dot."""

_OTHER_ENDS = {
    "DICOM": "dcm dicom ima",
    "NIfTI": "nii nii.gz",
    "volume": "mgz mha mhd nrrd",
    "HDF5": "h5 hdf5",
    "HDF": "hdf he5",
    "netCDF": "nc",
    "Zarr": "zarr",
    "N5": "n5",
    "MATLAB": "mat",
    "NumPy archive": "npz",
    "FITS": "fits fit",
    "whole slide": "svs ndpi scn mrxs vms bif qptiff",
    "microscopy": "czi lsm nd2 lif oib oif vsi stk ims",
    "raster without a header": "img raw bil bsq",
    "list of rasters": "vrt",
    "GDAL mask, not applied": "msk",
    "GDAL overviews": "ovr",
    "GDAL metadata, not applied": "aux.xml",
    "place on the map": "tfw tifw jgw jpgw pgw pngw wld prj",
    "wavelet raster": "ecw sid",
    "JPEG-LS": "jls",
    "JPEG XR": "jxr",
    "OpenEXR": "exr",
    "PFM": "pfm",
    "PAM": "pam",
    "Targa": "tga",
    "icon": "ico",
    "Photoshop": "psd",
    "GIMP": "xcf",
    "vector drawing": "svg eps",
    "document": "pdf djvu doc docx",
    "camera raw": "cr2 cr3 nef arw dng orf raf rw2",
    "video": "mp4 mov m4v avi mkv webm mpg mpeg wmv",
    "archive": "zip tar tar.gz tgz gz 7z rar",
    "database": "lmdb mdb",
    "table": "parquet csv tsv xlsx xls",
    "text": "txt md",
    "": "db dds hdr html ini ipynb json py tfrecord xml yaml yml",
}
OTHER_EXTENSIONS = {end: words for words, ends in _OTHER_ENDS.items() for end in ends.split()}
"""The content of other files by the ends of their names; empty where nothing has to be said."""


@dataclass(frozen=True)
class Kind:
    """A kind of files.

    Args:
        name: The name of the kind, such as ``JPEG`` or ``HTML page``.
        is_image: Whether files of this kind are images that are read, perhaps with a package that has to be installed.
        hint: Advice for a file that is not read; empty where there is none.
        article: The article that the name needs in a sentence, ``a`` or ``an``.
        why_not: The reason why such a file is not read.
    """

    name: str
    is_image: bool = False
    hint: str = ""
    article: str = ""
    why_not: str = "not an image"

    @property
    def words(self) -> str:
        """The name as it stands in a sentence, such as ``an HTML page``."""
        return f"{self.article} {self.name}".lstrip()

    @property
    def refusal(self) -> str:
        """The fault of such a file in words, such as ``is a git-lfs pointer, not an image: run git lfs pull``."""
        why = "" if self.is_image else f", {self.why_not}"
        return f"is {self.words}{why}" + (f": {self.hint}" if self.hint else "")

    def is_named(self, name: str) -> bool:
        """Whether a file's name ends like those of this kind; True for kinds that names do not tell."""
        ends = EXTENSIONS.get(self.name)
        return ends is None or extension(name) in ends


JPEG = Kind("JPEG", is_image=True)
PNG = Kind("PNG", is_image=True)
WEBP = Kind("WebP", is_image=True)
TIFF = Kind("TIFF", is_image=True)
BMP = Kind("BMP", is_image=True)
GIF = Kind("GIF", is_image=True)
JPEG_2000 = Kind("JPEG 2000", is_image=True)
HEIC = Kind("HEIC", is_image=True)
AVIF = Kind("AVIF", is_image=True)
JPEG_XL = Kind("JPEG XL", is_image=True)
NETPBM = Kind("Netpbm", is_image=True)
NUMPY = Kind("NumPy array", is_image=True, article="a")


def _unread(name: str, hint: str, article: str = "") -> Kind:
    """A kind that holds pictures and yet is not read."""
    return Kind(name, hint=hint, article=article, why_not="which is not read")


_ARRAYS = "convert it to PNG, TIFF or .npy, or give its arrays from Python"
_CONVERT = "convert it to PNG or TIFF"
_DOWNLOAD = "its download failed, so fetch it again"
_FRAMES = "save its frames as images"
_UNPACK = "unpack it"

EMPTY = Kind("empty file", hint="its copy or download failed, so fetch it again", article="an")
ZEROS = Kind("file of zeros alone", hint="its copy or download was cut off, so fetch it again", article="a")
UNKNOWN = Kind("file of a kind that is not known", article="a")
TEXT = Kind("text")
HTML = Kind("HTML page", hint=_DOWNLOAD, article="an")
XML = Kind("XML", hint="if it is a server's answer in place of an image, fetch that again")
SVG = _unread("SVG drawing", _CONVERT, "an")
JSON = Kind("JSON", hint="if it is a server's answer in place of an image, fetch that again")
BASE64 = Kind("image as base64 text", hint="decode it to bytes first", article="an")
GIT_LFS = Kind("git-lfs pointer", hint="run git lfs pull", article="a")
GIT_ANNEX = Kind("git-annex pointer", hint="run git annex get", article="a")
DICOM = _unread("DICOM", _ARRAYS)
NIFTI = _unread("NIfTI", "save its slices as PNG, TIFF or .npy, or give its arrays from Python")
HDF5 = _unread("HDF5", _ARRAYS)
PDF = _unread("PDF", "save its pages as images")
ZIP = Kind("ZIP archive", hint=_UNPACK, article="a")
GZIP = Kind("gzip archive", hint=_UNPACK, article="a")
VIDEO = _unread("video", _FRAMES, "a")
CAMERA_RAW = _unread("camera raw", "develop it to TIFF or JPEG")
APPLE_DOUBLE = Kind(
    "macOS metadata file", hint="it can be deleted: the image has the same name without '._'", article="a"
)

# (position, bytes there, kind): the first that fits. What needs more than that is in `kind_of`.
_SIGNATURES: tuple[tuple[int, bytes, Kind], ...] = (
    (0, b"\xff\xd8\xff\xf7", _unread("JPEG-LS", _CONVERT)),
    (0, b"\xff\xd8\xff", JPEG),
    (0, b"\x89PNG\r\n\x1a\n", PNG),
    (8, b"CR\x02", CAMERA_RAW),
    (0, b"IIU\0", CAMERA_RAW),
    (0, b"IIRO", CAMERA_RAW),
    (0, b"FUJIFILMCCD-RAW", CAMERA_RAW),
    (0, b"II*\0", TIFF),
    (0, b"MM\0*", TIFF),
    (0, b"II+\0", TIFF),
    (0, b"MM\0+", TIFF),
    (0, b"II\xbc", _unread("JPEG XR", _CONVERT)),
    (0, b"GIF87a", GIF),
    (0, b"GIF89a", GIF),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", JPEG_2000),
    (0, b"\xff\x4f\xff\x51", JPEG_2000),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", JPEG_XL),
    (0, b"\xff\x0a", JPEG_XL),
    (0, b"\x93NUMPY", NUMPY),
    (128, b"DICM", DICOM),
    (344, b"n+1\0", NIFTI),
    (344, b"ni1\0", NIFTI),
    (4, b"n+2\0", NIFTI),
    (4, b"ni2\0", NIFTI),
    (0, b"\x89HDF\r\n\x1a\n", HDF5),
    (0, b"%PDF-", PDF),
    (0, b"8BPS", _unread("Photoshop", _CONVERT)),
    (0, b"gimp xcf", _unread("GIMP", _CONVERT)),
    (0, b"v/1\x01", _unread("OpenEXR", "convert it to a 32-bit TIFF")),
    (0, b"#?RADIANCE", _unread("Radiance HDR", "convert it to a 32-bit TIFF")),
    (0, b"PF\n", _unread("PFM", "convert it to a 32-bit TIFF")),
    (0, b"Pf\n", _unread("PFM", "convert it to a 32-bit TIFF")),
    (0, b"P7\n", _unread("PAM", _CONVERT)),
    (0, b"DDS ", _unread("DDS", _CONVERT)),
    (0, b"qoif", _unread("QOI", _CONVERT)),
    (0, b"\x8aMNG\r\n\x1a\n", _unread("MNG", _CONVERT)),
    (0, b"BPG\xfb", _unread("BPG", _CONVERT)),
    (0, b"AT&TFORM", _unread("DjVu", "save its pages as images")),
    (0, b"icns", _unread("icon", _CONVERT, "an")),
    (0, b"\0\0\x01\0", _unread("icon", _CONVERT, "an")),
    (0, b"SIMPLE  =", _unread("FITS", _ARRAYS)),
    (0, b"NRRD000", _unread("NRRD", _ARRAYS)),
    (0, b"ObjectType = Image", _unread("MetaImage", _ARRAYS)),
    (0, b"CDF\x01", _unread("netCDF", _ARRAYS)),
    (0, b"CDF\x02", _unread("netCDF", _ARRAYS)),
    (0, b"CDF\x05", _unread("netCDF", _ARRAYS)),
    (0, b"MATLAB 5.0", _unread("MATLAB file", _ARRAYS, "a")),
    (0, b"ZISRAWFILE", _unread("Zeiss CZI", "save it as OME-TIFF")),
    (0, b"\xda\xce\xbe\x0a", _unread("Nikon ND2", "save it as OME-TIFF")),
    (0, b"PAR1", Kind("Parquet table", article="a")),
    (0, b"ARROW1", Kind("Arrow table", article="an")),
    (0, b"SQLite format 3\0", Kind("SQLite database", article="a")),
    (
        0,
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        Kind("OLE file, such as Thumbs.db or an old Office document", article="an"),
    ),
    (0, b"\0\x05\x16\x07", APPLE_DOUBLE),
    (0, b"\0\x05\x16\0", APPLE_DOUBLE),
    (0, b"\0\0\0\x01Bud1", Kind("macOS .DS_Store file", article="a")),
    (0, b"L\0\0\0\x01\x14\x02\0", Kind("Windows shortcut", hint="copy the file that it leads to", article="a")),
    (0, b"book\0\0\0\0mark\0\0\0\0", Kind("macOS alias", hint="copy the file that it leads to", article="a")),
    (0, b"\x1aE\xdf\xa3", VIDEO),
    (0, b"\0\0\x01\xba", VIDEO),
    (0, b"\0\0\x01\xb3", VIDEO),
    (0, b"FLV\x01", VIDEO),
    (0, b"OggS", VIDEO),
    (0, b"0&\xb2u\x8ef\xcf\x11", VIDEO),
    (4, b"moov", VIDEO),
    (4, b"mdat", VIDEO),
    (0, b"ID3", Kind("sound")),
    (0, b"fLaC", Kind("sound")),
    (0, b"7z\xbc\xaf'\x1c", Kind("7z archive", hint=_UNPACK, article="a")),
    (0, b"Rar!\x1a\x07", Kind("RAR archive", hint=_UNPACK, article="a")),
    (0, b"\xfd7zXZ\0", Kind("xz archive", hint=_UNPACK, article="an")),
    (4, b"1AY&SY", Kind("bzip2 archive", hint=_UNPACK, article="a")),
    (0, b"(\xb5/\xfd", Kind("Zstandard archive", hint=_UNPACK, article="a")),
    (257, b"ustar", Kind("tar archive", hint=_UNPACK, article="a")),
    (0, b"%!PS", _unread("PostScript", _CONVERT)),
    (0, b"{\\rtf", TEXT),
)

_BMP_HEADERS = frozenset({12, 16, 40, 52, 56, 64, 108, 124})  # sizes of the header that follows the file's own
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_BASE64 = (b"data:image/", b"iVBORw0KGgo", b"/9j/", b"R0lGOD", b"UklGR", b"SUkqA", b"TU0AK")
_LOOK = 4096  # bytes from the start that are looked at


def kind_of(data: bytes) -> Kind:
    """Tell the kind of a file by its first bytes: ``UNKNOWN`` where they do not say.

    Args:
        data: The file, or its first few thousand bytes.
    """
    head = data[:_LOOK]
    if not head:
        return EMPTY
    if not data.strip(b"\0"):
        return ZEROS
    for place, mark, kind in _SIGNATURES:
        if head.startswith(mark, place):
            return kind
    if head[:4] in (b"RIFF", b"RIFX"):
        return {b"WEBP": WEBP, b"AVI ": VIDEO, b"WAVE": Kind("sound")}.get(head[8:12], UNKNOWN)
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return BMP
    if head[4:8] == b"ftyp":
        return _of_media_container(head)
    if re.match(rb"P[1-6](#|\s+[#\d])", head):
        return NETPBM
    if head[:2] == b"\x1f\x8b":
        return _of_gzip(head)
    if head[:2] == b"PK" and head[2:4] in (b"\x03\x04", b"\x05\x06", b"\x07\x08"):
        return _of_zip(head)
    if head[:2] in (b"\x02\0", b"\x08\0") and head[4:6] in (b"UL", b"CS", b"UI", b"DA", b"OB"):
        return DICOM  # without its preamble
    return _of_text(head)


def _of_media_container(head: bytes) -> Kind:
    """Tell the kind of an ISO base media file by its brands: the major one, then the compatible ones."""
    size = min(max(int.from_bytes(head[:4], "big"), 16), len(head))
    brands = [head[8:12], *(head[i : i + 4] for i in range(16, size, 4))]
    if _AVIF_BRANDS.intersection(brands):
        return AVIF
    if _HEIC_BRANDS.intersection(brands):
        return HEIC
    if brands[0] == b"crx ":
        return CAMERA_RAW
    if brands[0] in (b"jp2 ", b"jpx ", b"jpm "):
        return JPEG_2000
    return VIDEO


def _of_gzip(head: bytes) -> Kind:
    try:
        inside = zlib.decompressobj(wbits=31).decompress(head, _LOOK)
    except zlib.error:
        return GZIP
    return NIFTI if inside and kind_of(inside) is NIFTI else GZIP


def _of_zip(head: bytes) -> Kind:
    """Tell the kind of a ZIP archive by the name of its first entry."""
    first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if first.endswith(b".npy"):
        return _unread("NumPy archive", "save its arrays as .npy, or give them from Python", "a")
    if first.startswith((b"[Content_Types].xml", b"_rels/", b"word/", b"xl/", b"ppt/")):
        return Kind("Office document", article="an")
    return ZIP


def _of_text(head: bytes) -> Kind:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith((b"version https://git-lfs", b"version https://hawser")):
        return GIT_LFS
    if b"/annex/objects/" in start[:200]:
        return GIT_ANNEX
    lower = start.lower()
    if lower.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return HTML
    if lower.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype")):
        return SVG if b"<svg" in lower else HTML if b"<html" in lower else XML
    if start.startswith(_BASE64):
        return BASE64
    if not _is_text(head):
        return UNKNOWN
    return JSON if start.startswith((b"{", b"[")) else TEXT


def _is_text(head: bytes) -> bool:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True  # a mark of UTF-16
    if any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head):
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(head) - 3  # a character that the look has cut
    return True


def extension(name: str) -> str:
    """The end of a file's name in lower case without its dot, such as ``png`` or ``nii.gz``; '' where there is none."""
    base = name.rpartition("/")[2].lower().lstrip(".")
    stem, dot, end = base.rpartition(".")
    if not dot:
        return ""
    double = f"{stem.rpartition('.')[2]}.{end}"
    return double if double in OTHER_EXTENSIONS and "." in stem else end
